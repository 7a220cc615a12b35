//! Ids of images, snapshots, volumes and runs; CPU architectures; and the block, the unit of a snapshot's data.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
id!(/// `ami-` and 17 hexadecimal digits.
    ImageId);
id!(/// `snap-` and 17 hexadecimal digits.
    SnapshotId);
id!(/// `vol-` and 17 hexadecimal digits.
    VolumeId);
id!(/// The id of a run, which is usually the bake of one image: 32 random hexadecimal digits. Every resource that the
    /// run creates in the cloud has this id as a tag.
    RunId);

impl RunId {
    pub fn new() -> Self {
        let mut bytes = [0u8; 16];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
            .expect("getrandom never returns fewer than 16 bytes (getrandom(2))");
        Self(bytes.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Returns the first 8 digits, for text that people read.
    pub fn short(&self) -> &str {
        &self.0[..self.0.len().min(8)]
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

/// An image's instruction set, as EC2 spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    X86_64,
    Arm64,
}

impl Architecture {
    /// The architecture of this machine.
    pub const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Arm64 } else { Self::X86_64 };

    pub fn as_str(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Arm64 => "arm64",
        }
    }

    /// Returns whether this machine can run programs of this architecture: natively, or with an emulator that is
    /// registered in the kernel (binfmt_misc).
    pub fn runs_here(self) -> bool {
        let emulator = match self {
            Self::X86_64 => "/proc/sys/fs/binfmt_misc/qemu-x86_64",
            Self::Arm64 => "/proc/sys/fs/binfmt_misc/qemu-aarch64",
        };
        self == Self::HOST || std::path::Path::new(emulator).exists()
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The size of a block in bytes. The EBS direct APIs support only this size.
pub const BLOCK: usize = 512 << 10;

/// A block's SHA256.
pub type Digest = [u8; 32];

pub fn digest_of(data: &[u8]) -> Digest {
    Sha256::digest(data).into()
}
