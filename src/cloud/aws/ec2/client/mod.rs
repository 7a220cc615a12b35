//! How EC2 is called: one call, its errors, and how long oven waits.

pub(crate) mod call;
pub mod connection;
pub(crate) mod errors;
pub mod in_flight;
pub mod permissions;
pub mod timeouts;
