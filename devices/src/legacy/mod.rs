//! The few devices of a PC that are still spoken to by port.
pub mod cmos;
pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
