//! The options of a bake.

/// How a bake handles existing images and failures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BakeOptions {
    /// Bakes even if the image exists. The name of the new image also contains the run's id, so that it differs from
    /// the name of the existing image.
    pub force: bool,
    /// Deregisters a failed or incomplete image that oven created, if it has the name of the new image.
    pub replace_failed: bool,
    /// The tool whose rule decides whether an existing image is accepted. `None` means oven's rule.
    pub compat: Option<Compat>,
    /// Preserves the disk if a step fails. `oven shell RUN` opens it.
    pub keep_on_failure: bool,
    /// Reads the finished snapshot back and compares it with the blocks that oven sent. Needs direct disks, because
    /// with attached disks oven sends no blocks.
    pub verify: bool,
}

/// A tool whose existing images are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compat {
    /// GumGum's AMI Bakery. It compares only the tag `ami_config_checksum`.
    Gumgum,
}
