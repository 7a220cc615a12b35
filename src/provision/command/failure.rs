//! Explains the failure of a command: what was wrong, where, and what to do.

use super::{CommandRunner, DefinitionTable, ImageCommand};
use crate::definition::PackageRequest;
use crate::error::{Failure, Kind};
use crate::provision::diagnose::{Diagnoser, Diagnosis};
use crate::provision::package_cache::no_space_failure;
use crate::provision::space::{self, ImageSpace};
use crate::sandbox::spec::{ExitStatus, StepExit};
use crate::text::ShortList;
use std::time::Duration;

/// The time limit for the list of a package's versions, the number of versions that an error shows, and the maximum
/// length of a version.
const VERSIONS_TIMEOUT: Duration = Duration::from_secs(60);
const VERSIONS_MAX: usize = 8;
const VERSION_LENGTH_MAX: usize = 100;

impl CommandRunner<'_> {
    /// If a step of the plan failed because of a package whose version the definition sets, adds the versions that exist
    /// to the explanation. If they cannot be listed, returns the explanation itself.
    pub(super) async fn add_known_versions(&self, call: &ImageCommand<'_>, meaning: Diagnosis) -> Diagnosis {
        let has_version = |ask: &PackageRequest| matches!(ask, PackageRequest::Named { name, version: Some(_), .. } if Some(name) == meaning.package.as_ref());
        let argv = &self.work.plan.versions;
        if argv.is_empty() || call.key.is_some() || !self.work.image.packages.iter().any(has_version) {
            return meaning;
        }
        let name = meaning.package.as_deref().unwrap_or_default();
        let list = ImageCommand {
            why: format!("listing the versions of {name}"),
            name: argv[0].clone(),
            argv: argv.iter().map(|argument| argument.replace("{name}", name)).collect(),
            env: call.env.clone(),
            trusted: call.trusted,
            timeout: VERSIONS_TIMEOUT,
            ..ImageCommand::plan_defaults(self)
        };
        let Ok(answer) = self.ask(&list).await else { return meaning };
        let (mut versions, mut count) = (ShortList::new(VERSIONS_MAX), 0_usize);
        for version in answer.lines().map(str::trim) {
            if !version.is_empty() && version.len() <= VERSION_LENGTH_MAX {
                count += 1;
                versions.add(|| version.to_owned());
            }
        }
        match count {
            1.. => Diagnosis {
                means: format!("{}; known versions: {}", meaning.means, versions.join(", ")),
                ..meaning
            },
            0 => meaning,
        }
    }

    /// Explains the failure of a command. `meaning` is an explanation of the command's output.
    pub(super) fn failure(
        &self,
        call: &ImageCommand<'_>,
        exit: &StepExit,
        diagnoser: &Diagnoser,
        meaning: Option<Diagnosis>,
    ) -> Failure {
        let (image, status) = (self.work.image, exit.status);
        let tail = diagnoser.tail();
        let how = match status {
            ExitStatus::TimedOut => {
                format!("it took longer than {} s and was killed", call.timeout.as_secs())
            }
            status => format!("{}: {status}", call.name),
        };
        let limit = exit.exceeded_limit.as_ref();
        if let Some(limit) = limit.filter(|limit| limit.ended_step) {
            let what = format!("{} failed: {} ({how}){tail}", call.why, limit.message);
            return Kind::Step.failure(what).hint(&limit.hint);
        }
        // The command may have failed for another reason, so its own error comes first.
        let how = limit.map_or(how.clone(), |limit| format!("{how}; {}", limit.message));
        let space = ImageSpace::of(self.place.root).ok();
        // A file system that was full before the first command need not be the cause.
        let before = self.space.as_ref();
        let full =
            space.as_ref().and_then(|space| before.map_or(space.full(), |before| space.full_since(before)));
        if let Some(dir) = self.downloads.dir().filter(|_| call.fetches && diagnoser.no_space)
            && full.is_none()
        {
            return no_space_failure(&dir);
        }
        if full.is_none()
            && let Some(memory) = diagnoser.full_memory(exit)
        {
            let what = format!("{} failed: {} ({how}){tail}", call.why, memory.message);
            let is_of_test = exit.discarded.iter().any(|discarded| discarded.if_full == memory);
            let of_image =
                memory.of_image.zip(space.as_ref()).map(|(path, space)| space.containing(&path).hint());
            let remedy = of_image.unwrap_or_else(|| space::LARGER_MEMORY_HINT.to_owned());
            let copies = if is_of_test { space::COPIED_FILES_HINT } else { "" };
            return Kind::Step.failure(what).hint(format!("{remedy}{copies}"));
        }
        let was_full = || space.as_ref().map(|space| diagnoser.full_file_system(space));
        if let Some(full) = full.or_else(|| was_full().filter(|_| diagnoser.no_space)) {
            let what = format!("{} failed: {full} ({how}){tail}", call.why);
            return Kind::Step.failure(what).hint(full.hint());
        }
        if let Some(Diagnosis { means, hint, package }) = meaning {
            let failure = match package {
                Some(package) => {
                    let value = Some(package.as_str()).filter(|package| !package.is_empty());
                    let place = image.place_of_package(value);
                    Kind::Definition.failure(format!("{place}: {means}{tail}")).at(&place)
                }
                None if call.is_good(status) => {
                    let code = if let ExitStatus::Exited(code) = status { code } else { 0 };
                    let though =
                        format!("{} exited with {code}, but its output shows the failure", call.name);
                    Kind::Step.failure(format!("{} failed: {means} ({though}){tail}", call.why))
                }
                None => Kind::Step.failure(format!("{} failed: {means} ({how}){tail}", call.why)),
            };
            return match hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            };
        }
        let failure = match &call.key {
            Some(DefinitionTable { table, name, line }) => {
                let place = image.place_of_table(table, *line);
                Kind::Step.failure(format!("{place}: the [[{table}]] {name} failed: {how}{tail}")).at(&place)
            }
            None => Kind::Step.failure(format!("{} failed: {how}{tail}", call.why)),
        };
        // The exit codes 126 and 127 mean that the program did not run.
        let is_quiet = diagnoser.lines == 0 && matches!(status, ExitStatus::Exited(1..126));
        match &call.key {
            _ if status == ExitStatus::TimedOut => match &call.key {
                Some(DefinitionTable { table, .. }) => failure.hint(format!("Increase `timeout` (in seconds) of the [[{table}]].")),
                None => failure.hint("Perhaps a package's script waits for input, which no step gets."),
            },
            _ if limit.is_some() => failure.hint(limit.map_or("", |limit| &limit.hint)),
            _ if diagnoser.metadata && call.network && self.fenced() => failure.hint(
                "oven blocks access to the builder's metadata service, because it supplies the builder's credentials. If \
                 the steps may use these credentials, set `imds = true` at the top of image.toml.",
            ),
            _ if diagnoser.step_limit.is_some() => failure.hint(diagnoser.step_limit.unwrap_or_default()),
            _ if diagnoser.device && !image.disk_writable && !call.throwaway => failure.hint(
                "Steps can only read the image's disk. If a step installs a boot loader, set `writable = true` in [disk] \
                 of image.toml.",
            ),
            Some(DefinitionTable { table, .. }) if diagnoser.no_network && !call.network => failure.hint(format!(
                "It runs without the network. If it needs the network, set `network = true` in its [[{table}]]."
            )),
            None if diagnoser.no_network && !call.network => failure.hint(
                "Packages are installed without the network. If a package's script has to download something, set \
                 `network = true` at the top of image.toml.",
            ),
            // A test is often quiet, such as `grep -q`.
            Some(DefinitionTable { table: table @ ("run" | "ansible"), .. }) if is_quiet && !call.network => failure.hint(format!(
                "It printed nothing. It runs without the network: if it needs the network, set `network = true` in its \
                 [[{table}]]."
            )),
            Some(DefinitionTable { table: "test", .. }) => failure.hint("oven makes no image if a test fails."),
            _ => failure,
        }
    }
}
