//! A replicated guest seen from outside: the two machines that run it, and clients that notice
//! whatever a failover loses or does twice.
pub mod agent;
pub mod certificates;
pub mod chain;
pub mod client;
pub mod counter;
pub mod dialer;
pub mod etcd;
pub mod machine;
pub mod pair;
pub mod probe;
pub mod recorder;
pub mod relay;
pub mod witness;
