//! QMP on the wire and as types. Knows nothing of virtual machines.
#![forbid(unsafe_code)]
