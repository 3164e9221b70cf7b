//! Crash points of the registry.
