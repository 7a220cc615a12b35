//! What the parts of a provisioning share: the image, and what is to be done in it.

use super::package_cache::Kept;
use super::space;
use crate::config::project::NetworkSettings;
use crate::definition::Definition;
use crate::device::Node;
use crate::error::Kind;
use crate::image::tree::Inside;
use crate::report::Report;
use crate::sandbox::egress::Fence;
use crate::secrets::Secrets;
use anyhow::Error;
use oven_distro::Plan;
use std::path::{Path, PathBuf};

/// Where an image is mounted.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// A mount point.
    pub root: &'a Path,
    pub inside: &'a Inside,
    /// The disk's own nodes.
    pub nodes: &'a [Node],
    /// Directories whose file system this kernel cannot mount.
    pub unmounted: &'a [PathBuf],
}

/// What is to be done in an image.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    pub image: &'a Definition,
    pub plan: &'a Plan,
    pub network: &'a NetworkSettings,
    /// What the definition's scripts are told in confidence.
    pub secrets: &'a Secrets,
    /// What is asked of this machine; a definition with `imds = true` asks for nothing.
    pub guard: Guard,
    /// This program.
    pub helper: &'a Path,
    /// Where downloads are kept; `None`: in the image, as long as it is baked.
    pub kept: Option<&'a Kept>,
    pub report: &'a Report,
}

impl Work<'_> {
    /// A failure as its user should see it: without secrets, and with the reason where the image's disk is full.
    pub fn explain(&self, error: Error) -> Error {
        self.secrets.mask_error(Kind::Step.unless_known(space::explain(error)))
    }
}

/// Whether steps with the network are kept from the builder's credentials ([`crate::sandbox::egress`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// Where this machine can. For a bake that needs no credentials: there may be none.
    Wanted,
    /// Or there is no such step. For a builder in the cloud: its role may do what the bake does, and more.
    Required,
}

impl Guard {
    /// Whether steps are fenced. Where that cannot be and need not, it is told, once.
    pub(crate) fn fences(self, report: &Report) -> bool {
        if self == Self::Required {
            return true;
        }
        let fence = Fence::make();
        if let Err(error) = &fence {
            report.detail(format!("{error:#}"));
        }
        fence.is_ok()
    }
}
