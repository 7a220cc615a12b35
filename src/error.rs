//! Kinds of failure. Each has an exit code.

use std::fmt;

/// A kind of failure. Its number is the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// The command line is wrong.
    Usage = 2,
    /// A definition or a setting is wrong. The message names the file and the key.
    Definition = 3,
    /// A base image, an image or a run does not exist.
    NotFound = 4,
    /// A step in the image failed.
    Step = 5,
    /// The cloud refused a request, or the cloud failed. An error of unknown kind also has this exit code.
    Cloud = 6,
    /// The work succeeded, but some temporary resources could not be removed.
    LeftBehind = 7,
    /// This machine lacks something. `oven doctor` lists everything that it lacks.
    Machine = 8,
    /// Stopped by a signal.
    Interrupted = 130,
}

/// The exit code of a verb that succeeded.
pub const SUCCESS: u8 = 0;

/// A failure of a known kind. It is a cause in the chain of an [`anyhow::Error`].
#[derive(Debug)]
pub struct Failure {
    pub kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// Adds a hint: a whole sentence that says what the user can do.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

impl Kind {
    /// A failure of this kind. `message` says what was wrong and where.
    pub fn failure(self, message: impl fmt::Display) -> Failure {
        Failure { kind: self, message: message.to_string(), hint: None }
    }

    /// Like [`Self::failure`], but returns an [`anyhow::Error`], for `return Err(…)` and `ok_or_else`.
    pub fn error(self, message: impl fmt::Display) -> anyhow::Error {
        self.failure(message).into()
    }

    /// The kind of the outermost [`Failure`] in an error's chain; [`Kind::Cloud`] if the chain has none.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(|cause| cause.downcast_ref::<Failure>()).map_or(Self::Cloud, |f| f.kind)
    }

    /// Returns the error itself if it has a kind, otherwise an error of this kind with the same message.
    pub fn unless_known(self, error: anyhow::Error) -> anyhow::Error {
        if error.chain().any(|cause| cause.is::<Failure>()) {
            error
        } else {
            self.error(format!("{error:#}"))
        }
    }

    /// One word, for `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Definition => "definition",
            Self::NotFound => "not-found",
            Self::Step => "step",
            Self::Cloud => "cloud",
            Self::LeftBehind => "left-behind",
            Self::Machine => "machine",
            Self::Interrupted => "interrupted",
        }
    }
}

/// The outermost hint in an error's chain, if there is one.
pub fn hint_of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.hint.clone())
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn kind_and_hint_survive_contexts() {
        let error =
            Err::<(), _>(Kind::Step.failure("exit status 1").hint("Look at the log.")).context("testing");
        let error = error.context("baking web").unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Step);
        assert_eq!(hint_of(&error).as_deref(), Some("Look at the log."));
        assert_eq!(format!("{error:#}"), "baking web: testing: exit status 1");
    }

    #[test]
    fn an_unknown_failure_is_the_clouds_unless_it_is_known_better() {
        assert_eq!(Kind::of(&anyhow::anyhow!("?")), Kind::Cloud);
        let error = Kind::Step.unless_known(anyhow::anyhow!("?").context("asking"));
        assert_eq!((Kind::of(&error), format!("{error:#}")), (Kind::Step, "asking: ?".into()));
        let error = Kind::Step.unless_known(Kind::Machine.failure("no loop").hint("Load it.").into());
        assert_eq!((Kind::of(&error), hint_of(&error).as_deref()), (Kind::Machine, Some("Load it.")));
    }
}
