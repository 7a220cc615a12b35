//! The data that all parts of the provisioning share: the image, and the work to do in it.

use super::package_cache::store::PackageCache;
use super::space;
use crate::config::project::NetworkSettings;
use crate::config::project::StepLimits;
use crate::definition::Definition;
use crate::device::DeviceNode;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::report::Report;
use crate::sandbox::cgroup::StepCgroup;
use crate::secrets::Secrets;
use anyhow::Error;
use oven_distro::Plan;
use std::path::{Path, PathBuf};

/// A mounted image.
#[derive(Clone, Copy)]
pub struct MountedImage<'a> {
    /// The mount point of the image.
    pub root: &'a Path,
    pub inside: &'a ImageTree,
    /// The nodes of the image's disk.
    pub nodes: &'a [DeviceNode],
    /// The mount points whose file systems this kernel cannot mount.
    pub unmounted: &'a [PathBuf],
}

/// The work to do in an image, and the settings that it needs.
#[derive(Clone, Copy)]
pub struct ProvisionContext<'a> {
    pub image: &'a Definition,
    pub plan: &'a Plan,
    pub network: &'a NetworkSettings,
    /// The values of the definition's secrets.
    pub secrets: &'a Secrets,
    /// Whether steps with the network are fenced, so that they cannot reach the builder's credentials. If the
    /// definition has `imds = true`, no step is fenced.
    pub guard: EgressGuard,
    /// The limits of each step.
    pub limits: StepLimits,
    /// The path of this program.
    pub helper: &'a Path,
    /// The package cache. `None` means that nothing is cached for later bakes. Then package managers download to the
    /// image's own directories.
    pub package_cache: Option<&'a PackageCache>,
    pub report: &'a Report,
}

impl ProvisionContext<'_> {
    /// Prepares an error for the user. Masks secrets in it, and adds an explanation if a file system of the image is full.
    pub fn explain(&self, place: &MountedImage<'_>, error: Error) -> Error {
        let error = space::explain_full_disk(error, place.root, self.image.disk_writable);
        self.secrets.mask_error(Kind::Step.unless_machine(error))
    }

    /// Like [`Self::explain`], for an error before the first step. The base image is at fault, unless the disk is full
    /// or this machine fails.
    pub fn explain_base(&self, place: &MountedImage<'_>, error: Error) -> Error {
        let error = space::explain_full_disk(error, place.root, false);
        self.secrets.mask_error(Kind::Definition.unless_machine(error))
    }
}

/// Whether steps with the network are prevented from reaching the builder's credentials ([`crate::sandbox::cgroup::egress`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressGuard {
    /// Steps are fenced only if this machine supports it. This value is for bakes that need no cloud credentials. The
    /// builder of such a bake may have no credentials, so a missing fence is acceptable.
    Wanted,
    /// A step with the network fails if it cannot be fenced. This value is for builders in the cloud, because the
    /// builder's role has at least the permissions that the bake needs.
    Required,
}

impl EgressGuard {
    /// Returns whether steps are fenced. If a fence is impossible and not required, logs the reason.
    pub(crate) fn fences(self, report: &Report) -> bool {
        if self == Self::Required {
            return true;
        }
        let fence = StepCgroup::check_fence();
        if let Err(error) = &fence {
            report.detail(format!("{error:#}"));
        }
        fence.is_ok()
    }
}
