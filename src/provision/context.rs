//! What the parts of a provisioning share: the image, and what is to be done in it.

use super::package_cache::store::PackageCache;
use super::space;
use crate::config::project::NetworkSettings;
use crate::definition::Definition;
use crate::device::DeviceNode;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::report::Report;
use crate::sandbox::egress::EgressFence;
use crate::secrets::Secrets;
use anyhow::Error;
use oven_distro::Plan;
use std::path::{Path, PathBuf};

/// Where an image is mounted.
#[derive(Clone, Copy)]
pub struct MountedImage<'a> {
    /// A mount point.
    pub root: &'a Path,
    pub inside: &'a ImageTree,
    /// The disk's own nodes.
    pub nodes: &'a [DeviceNode],
    /// Directories whose file system this kernel cannot mount.
    pub unmounted: &'a [PathBuf],
}

/// What is to be done in an image, and with what.
#[derive(Clone, Copy)]
pub struct ProvisionContext<'a> {
    pub image: &'a Definition,
    pub plan: &'a Plan,
    pub network: &'a NetworkSettings,
    /// The values of the definition's secrets.
    pub secrets: &'a Secrets,
    /// Whether steps have to be fenced; with `imds = true` in the definition, none is.
    pub guard: EgressGuard,
    /// The path of this program.
    pub helper: &'a Path,
    /// The package cache; `None`: packages are cached in the image, during the bake.
    pub kept: Option<&'a PackageCache>,
    pub report: &'a Report,
}

impl ProvisionContext<'_> {
    /// A failure as its user should see it: without secrets, and with the reason where the image's disk is full.
    pub fn explain(&self, error: Error) -> Error {
        self.secrets.mask_error(Kind::Step.unless_known(space::explain_full_disk(error)))
    }
}

/// Whether steps with the network are kept from the builder's credentials ([`crate::sandbox::egress`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressGuard {
    /// If this machine can. For a bake that needs no credentials: there may be none.
    Wanted,
    /// Without a fence, such a step fails. For a builder in the cloud: its role may do what the bake does, and more.
    Required,
}

impl EgressGuard {
    /// Whether steps are fenced. If that is impossible and not required, the reason is logged once.
    pub(crate) fn fences(self, report: &Report) -> bool {
        if self == Self::Required {
            return true;
        }
        let fence = EgressFence::make();
        if let Err(error) = &fence {
            report.detail(format!("{error:#}"));
        }
        fence.is_ok()
    }
}
