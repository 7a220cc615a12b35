//! Programs that are installed only for a bake, and removed after the last playbook.

use crate::manager::Manager;
use oven_distro::{Job, Phase, Question, Refused, Step, Tools};
use oven_rpm::{UPDATE_TIMEOUT, fetch, step, words};

/// `None` if the job asks for no tools, if the package of a tool is unknown, or if the package manager is yum or
/// microdnf. These two do not record which packages were installed as dependencies. `is_refreshed` is true if the
/// plan's own steps refresh the package index.
pub fn tools(job: &Job, manager: Manager, is_refreshed: bool) -> Result<Option<Tools>, Refused> {
    let (mark, list): (&[_], _) = match manager {
        Manager::Dnf5 => (&["mark", "dependency"], "%{name}\\n"),
        Manager::Dnf => (&["mark", "remove"], "%{name}"),
        Manager::Yum | Manager::Microdnf => return Ok(None),
    };
    let packages: Option<Vec<_>> = job.tools.iter().map(|program| package_of(program)).collect();
    let Some(packages) = packages.filter(|packages| !packages.is_empty()) else { return Ok(None) };
    let (names, packages) = (packages.join(" and "), words(packages));
    // Recommended packages are not needed during a bake.
    let options = manager.options(&Job { recommends: false, ..job.clone() })?;
    let clean = manager.clean_metadata_command();
    let verb = words(["install"]);
    // Commands that only concern installed packages need no repositories.
    let installed = words(["-y", "--disablerepo=*"]);
    let mut steps = Vec::new();
    if !is_refreshed {
        let argv = manager.argv(&[&options, &manager.refresh_command()]);
        steps.push(Step { timeout: UPDATE_TIMEOUT, ..fetch("refreshing the package index", argv, &clean) });
    }
    let download = manager.argv(&[&options, &verb, &manager.download_options(), &packages]);
    steps.push(fetch(&format!("downloading {names} for this bake"), download, &clean));
    let install = manager.argv(&[&options, &manager.cache_only_options(), &verb, &packages]);
    let install = step(Phase::Install, &format!("installing {names} for this bake"), install);
    steps.push(Step { network: job.network, ..install });
    let mark = manager.argv(&[&installed, &words(mark.iter().copied()), &packages]);
    steps.push(step(Phase::Install, &format!("marking {names} as automatically installed"), mark));

    let unneeded = ["-q", "--disablerepo=*", "repoquery", "--unneeded", "--queryformat", list];
    let unneeded = step(Phase::Verify, "", manager.argv(&[&words(unneeded)]));
    // Removes exactly the given packages, and not their dependencies.
    let remove =
        words(["--setopt=clean_requirements_on_remove=0", "remove", "{name}-{version}.{architecture}"]);
    let remove = step(Phase::Install, &format!("removing {names}"), manager.argv(&[&installed, &remove]));
    Ok(Some(Tools {
        steps,
        unneeded: Question { argv: unneeded.argv, env: unneeded.env, output: "*".into() },
        remove: vec![remove],
    }))
}

fn package_of(program: &str) -> Option<&'static str> {
    (program == "ansible-playbook").then_some("ansible-core")
}
