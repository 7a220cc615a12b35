//! Calls EC2. The files here send and retry calls, classify errors, check permissions, and define timeouts.

pub(crate) mod call;
pub mod connection;
pub(crate) mod errors;
pub mod in_flight;
pub mod permissions;
pub mod timeouts;
