//! A network of several hosts on one: network namespaces, joined by a switch and by links in user
//! space whose delay, loss, rate and cuts change at run time. This needs root, and nothing that a
//! kernel may lack (`netem`).
pub mod hosts;
pub mod line;
pub mod namespace;
pub mod proxy;
pub mod switch;
