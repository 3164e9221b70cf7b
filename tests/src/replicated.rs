//! A guest that is to outlive its host, seen from outside: its machine, and clients that notice
//! whatever a failover loses or does twice.
pub mod client;
pub mod counter;
pub mod machine;
pub mod probe;
