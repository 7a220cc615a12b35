//! What makes two bakes the same: `ami_config_checksum`, and the fingerprint.

pub mod checksum;
pub mod fingerprint;
