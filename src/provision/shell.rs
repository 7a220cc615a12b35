//! Runs an isolated shell for a person.

use super::context::EgressGuard;
use crate::config::project::StepLimits;
use crate::mount::Root;
use crate::report::Report;
use crate::sandbox::cgroup::CgroupSupport;
use anyhow::Result;
use oven_distro::Shim;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The options of an isolated shell.
pub struct ShellRequest<'a> {
    /// The path of this program.
    pub helper: &'a Path,
    pub shims: Vec<Shim>,
    /// How the builder's credentials are protected from the shell. `None` means that the shell has no network.
    pub network: Option<EgressGuard>,
    pub limits: StepLimits,
    /// A command to run instead of the shell.
    pub command: &'a [String],
}

/// Runs an isolated shell, or a command instead of it, on the terminal of this process. Returns the exit code of the
/// shell or command.
pub async fn shell(root: &Root<'_>, request: ShellRequest<'_>, report: &Report) -> Result<u8> {
    let ShellRequest { helper, shims, network, limits, command } = request;
    CgroupSupport::get().report_gaps(limits, report);
    let bash = root.tree().exists("/bin/bash")?;
    let argv = match command {
        [] if bash => vec!["/bin/bash".to_owned(), "--login".to_owned()],
        [] => vec!["/bin/sh".to_owned(), "-l".to_owned()],
        command => command.to_vec(),
    };
    let spec = crate::sandbox::spec::StepSpec {
        root: root.path().to_owned(),
        argv,
        env: BTreeMap::new(),
        cwd: "/root".to_owned(),
        network: network.is_some(),
        fenced: network.is_some_and(|guard| guard.fences(report)),
        resolv_conf: None,
        shims,
        binds: Vec::new(),
        caches: Vec::new(),
        nodes: root.nodes().to_vec(),
        disk_writable: false,
        limits,
        audit_socket: false,
        status: false,
        throwaway: false,
        interactive: true,
    };
    let exit = crate::sandbox::run(helper, &spec, SHELL_TIMEOUT, &mut |_| ()).await?;
    if let Some(limit) = &exit.exceeded_limit {
        report.warn(format!("{}. {}", limit.message, limit.hint));
    }
    Ok(match exit.status {
        crate::sandbox::spec::ExitStatus::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
        // Shells use the same exit code for a command that a signal killed.
        crate::sandbox::spec::ExitStatus::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        crate::sandbox::spec::ExitStatus::TimedOut => u8::MAX,
    })
}

/// The time limit of a shell. A person may leave a shell open for days, so the limit is one year.
const SHELL_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
