//! What a bake is asked for.

/// How a bake treats what exists already, and what it does with a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BakeOptions {
    /// Bakes even if the image exists; the new one gets a name of its own.
    pub force: bool,
    /// Deregisters a failed or incomplete image of ours that holds the name.
    pub replace_failed: bool,
    /// Whose rule decides what a hit is; `None`: oven's own.
    pub compat: Option<Compat>,
    /// Keeps the disk if a step fails, for `oven shell RUN`.
    pub keep_on_failure: bool,
    /// Reads the finished snapshot back and compares it with what was sent. Only where it is sent from here.
    pub verify: bool,
}

/// A tool whose images count as hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compat {
    /// AMI Bakery, which compares its checksum alone.
    Gumgum,
}
