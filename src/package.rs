//! Opens a package file: what it is, and what it says of itself.

/// What a package file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// As the package spells it: `amd64`, `all`, `x86_64`, `noarch`.
    pub architecture: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
}
