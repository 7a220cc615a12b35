//! Searches the image for programs that the definition's scripts and playbooks need.

use crate::image::tree::ImageTree;
use anyhow::Result;

/// The program that runs playbooks.
pub const ANSIBLE: &str = "ansible-playbook";

/// The directories in which a step searches for programs ([`crate::sandbox::spec::StepSpec`]).
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Returns whether `path` is one of the paths at which a step searches for `program`.
pub fn is_program_path(path: &str, program: &str) -> bool {
    path.rsplit_once('/').is_some_and(|(dir, name)| PATH.contains(&dir) && name == program)
}

/// Returns whether a step finds a program in the image.
pub fn has_program(inside: &ImageTree, program: &str) -> Result<bool> {
    for dir in PATH {
        if inside.exists(&format!("{dir}/{program}"))? {
            return Ok(true);
        }
    }
    Ok(false)
}
