//! The virtio-mmio transport (virtio 1.3, section 4.2).
