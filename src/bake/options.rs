//! Options of a bake.

/// How a bake treats what exists already, and what it does with a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BakeOptions {
    /// Bakes even if the image exists; the new image gets a unique name.
    pub force: bool,
    /// Deregisters a failed or incomplete image of oven's that has the name.
    pub replace_failed: bool,
    /// The tool whose rule decides whether the image exists; `None`: oven's own rule.
    pub compat: Option<Compat>,
    /// Keeps the disk if a step fails, for `oven shell RUN`.
    pub keep_on_failure: bool,
    /// Reads the finished snapshot back and compares it with the sent blocks. Only for disks whose blocks oven sends.
    pub verify: bool,
}

/// A tool whose images count as hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compat {
    /// AMI Bakery, which only compares its checksum.
    Gumgum,
}
