//! The few legacy PC devices that are accessed by port.
pub mod cmos;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
