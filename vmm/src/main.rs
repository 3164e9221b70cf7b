//! The `stratovirt` monitor.
fn main() {}
