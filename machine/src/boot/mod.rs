//! Boot: loads a kernel and its boot data into guest memory, and determines its entry point. This
//! module is independent of the processor; [`arch`](crate::arch) has the rest.
pub(crate) mod bytes;
pub(crate) mod initrd;
pub(crate) mod ram;
pub(crate) mod source;

pub use self::{initrd::InitrdError, source::SourceError};
pub use crate::arch::boot::{BootError, Entry, KernelError, Platform, Protocol, load};
pub(crate) use crate::arch::boot::{load_reading, preflight};
