//! Decides whether two bakes would make the same image, with `ami_config_checksum` and the fingerprint.

pub mod checksum;
pub mod fingerprint;
