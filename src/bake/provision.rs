//! Step 4: installs packages, places files and runs scripts.

use super::Bake;
use super::target::{self, Target};
use crate::definition::Definition;
use crate::mount::Root;
use crate::provision::command::CommandRunner;
use crate::provision::context::{MountedImage, ProvisionContext};
use crate::provision::package_cache::{self, CacheStore, PackageCache};
use crate::seal::Baseline;
use crate::secrets::Secrets;
use anyhow::{Context, Result};
use oven_distro::Plan;
use std::collections::BTreeMap;

/// The work to do in the image.
pub struct Provisioning {
    /// The definition. All its packages with a URL are already downloaded.
    pub(super) image: Definition,
    pub(super) plan: Plan,
    cache: PackageCache,
}

/// Requests a plan from the distribution's plugin. In `image`, all packages with a URL must already be downloaded.
/// Fails if the image's programs cannot run on this machine.
pub fn plan(bake: &Bake<'_>, target: &Target, image: Definition, root: &Root<'_>) -> Result<Provisioning> {
    let (distro, claims) = target::distro(bake.site, bake.image, &root.os_release()?)?;
    let job = target::job(&image, &target.base, &claims, root, &bake.site.settings)?;
    let plan = distro.plan_for(&job, Some(&image))?;
    let dir = bake.site.state.join(package_cache::DIR);
    let dir = std::path::absolute(&dir).with_context(|| format!("looking for {}", dir.display()))?;
    let cache = PackageCache {
        store: CacheStore::new(&dir, package_cache::LIMIT),
        base: target.base.snapshot.0.clone(),
    };
    Ok(Provisioning { image, plan, cache })
}

/// Creates the runner for commands in the image.
pub fn runner<'a>(
    bake: &'a Bake<'_>,
    job: &'a Provisioning,
    secrets: &'a Secrets,
    root: &'a Root<'_>,
) -> Result<CommandRunner<'a>> {
    let place = MountedImage {
        root: root.path(),
        inside: root.tree(),
        nodes: root.nodes(),
        unmounted: root.unmounted(),
    };
    let work = ProvisionContext {
        image: &job.image,
        plan: &job.plan,
        network: &bake.site.settings.network,
        secrets,
        guard: bake.site.egress_guard(),
        limits: bake.site.settings.limits,
        helper: &bake.site.helper,
        package_cache: Some(&job.cache),
        report: &bake.site.report,
    };
    CommandRunner::new(&place, &work).map_err(|error| work.explain_base(&place, error))
}

/// Runs the plan, places the definition's files and runs its scripts and tests. `baseline` is what the later checks
/// compare the image with. After the packages are installed and before scripts run, the state of the image is recorded
/// in it. Returns the outputs of the plan's fact commands, by name. One of them is `packages`, the list of installed
/// packages.
pub async fn packages_and_scripts(
    runner: &CommandRunner<'_>,
    baseline: &mut Baseline,
) -> Result<BTreeMap<String, String>> {
    let provisioned = async {
        let installed = crate::provision::packages(runner).await?;
        baseline.note_packages(runner)?;
        crate::provision::files_and_scripts(runner).await?;
        crate::provision::facts(runner, installed).await
    };
    provisioned.await.map_err(|error| runner.work.explain(&runner.place, error))
}
