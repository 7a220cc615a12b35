//! Kinds of failure. Each has an exit code.

use rustix::io::Errno;
use std::fmt;

/// A kind of failure. Its number is the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// The command line is wrong.
    Usage = 2,
    /// A definition, a setting or the base image is wrong. The message names the file and the key, or what is wrong in
    /// the image. A defect counts as the base's if the image had it before the first step.
    Definition = 3,
    /// A base image, an image or a run does not exist.
    NotFound = 4,
    /// A step in the image failed, or the image failed a check after the steps.
    Step = 5,
    /// The cloud refused a request, or the cloud failed. The cloud is EC2 and EBS, or the records of a local region.
    Cloud = 6,
    /// The work succeeded, but some temporary resources could not be removed.
    LeftBehind = 7,
    /// This machine lacks something, such as rights, devices, space or a feature of the kernel, or its disk fails. An
    /// error of unknown kind also has this exit code, because it is an error of the operating system.
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
    /// Whether the step's program ran. Then the step is at fault, even if it is the first step.
    program_ran: bool,
    /// The mistakes of which the failure consists, if their places are known.
    mistakes: Vec<Mistake>,
    /// The number of further mistakes, which are only counted.
    unlisted: usize,
}

/// A place in a file of the user, such as a key of image.toml. Its text is how messages name the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file's path, without invisible characters.
    pub file: String,
    pub line: Option<usize>,
    /// The key with its table, such as `disk.iops`.
    pub key: Option<String>,
    text: String,
}

/// One of the mistakes that a failure lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// `None` if the mistake is not in a file, or if its place is unknown.
    pub place: Option<Place>,
    pub message: String,
    pub hint: Option<String>,
}

impl Place {
    /// `what` is the key as messages spell it, such as `` `iops` of [disk] ``. If it is empty, the text is only the
    /// file and the line.
    pub fn new(file: String, line: Option<usize>, key: Option<String>, what: &str) -> Self {
        let at = line.map(|line| format!(":{line}")).unwrap_or_default();
        let what = if what.is_empty() { String::new() } else { format!(": {what}") };
        Self { text: format!("{file}{at}{what}"), file, line, key }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    /// Records the place of a failure that is a single mistake.
    pub fn at(mut self, place: &Place) -> Self {
        let (place, message) = (Some(place.clone()), self.message.clone());
        self.mistakes = vec![Mistake { place, message, hint: None }];
        self
    }

    /// Records the mistakes of which the failure consists. Its message lists all of them.
    pub fn with_mistakes(mut self, mistakes: Vec<Mistake>) -> Self {
        self.mistakes = mistakes;
        self
    }

    /// Adds a hint: a whole sentence that says what the user can do.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Records that the step's program ran, so that [`Kind::of_base`] does not blame the base.
    pub fn after_start(mut self) -> Self {
        self.program_ran = true;
        self
    }
}

impl Kind {
    /// A failure of this kind. `message` says what was wrong and where.
    pub fn failure(self, message: impl fmt::Display) -> Failure {
        Failure {
            kind: self,
            message: message.to_string(),
            hint: None,
            program_ran: false,
            mistakes: Vec::new(),
            unlisted: 0,
        }
    }

    /// A failure that consists of these mistakes and of further ones, which are only counted. Each mistake is a line of
    /// the message.
    pub fn failure_of(self, mistakes: Vec<Mistake>, unlisted: usize) -> Failure {
        let more = (unlisted > 0).then(|| format!("and {unlisted} more"));
        let lines = mistakes.iter().map(|mistake| mistake.message.as_str()).chain(more.as_deref());
        let message = lines.collect::<Vec<_>>().join("\n");
        Failure { mistakes, unlisted, ..self.failure(message) }
    }

    /// Like [`Self::failure`], but returns an [`anyhow::Error`], for `return Err(…)` and `ok_or_else`.
    pub fn error(self, message: impl fmt::Display) -> anyhow::Error {
        self.failure(message).into()
    }

    /// The kind of the outermost [`Failure`] in an error's chain; [`Kind::Machine`] if the chain has none.
    pub fn of(error: &anyhow::Error) -> Self {
        failure_in(error).map_or(Self::Machine, |failure| failure.kind)
    }

    /// Returns the error itself if it has a kind, otherwise an error of this kind with the same message.
    pub fn unless_known(self, error: anyhow::Error) -> anyhow::Error {
        if failure_in(&error).is_some() { error } else { self.error(format!("{error:#}")) }
    }

    /// Like [`Self::unless_known`], but for work on the files of an image. If the cause is an error of this machine,
    /// such as an I/O error of the disk, the kind is [`Kind::Machine`].
    pub fn unless_machine(self, error: anyhow::Error) -> anyhow::Error {
        let kind = if errno_of(&error).is_some_and(is_of_machine) { Self::Machine } else { self };
        kind.unless_known(error)
    }

    /// The kind of an I/O error: this kind, or [`Kind::Machine`] if this machine is at fault.
    pub fn of_io(self, error: &std::io::Error) -> Self {
        if Errno::from_io_error(error).is_some_and(is_of_machine) { Self::Machine } else { self }
    }

    /// Returns the error of a step that failed before any step changed the image. Its kind is [`Kind::Definition`]
    /// instead of [`Kind::Step`], because the base image has the defect. Other kinds do not change.
    pub fn of_base(error: anyhow::Error) -> anyhow::Error {
        if Self::of(&error) != Self::Step || failure_in(&error).is_some_and(|failure| failure.program_ran) {
            return error;
        }
        let failure = Self::Definition.failure(format!("{error:#}"));
        match hint_of(&error) {
            Some(hint) => failure.hint(hint).into(),
            None => failure.into(),
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

/// The outermost failure of an error: one that was added as a context, or one of the causes.
fn failure_in(error: &anyhow::Error) -> Option<&Failure> {
    error.downcast_ref().or_else(|| error.chain().find_map(|cause| cause.downcast_ref()))
}

/// The first error number of the operating system in an error's chain.
pub fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    error.chain().find_map(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().and_then(Errno::from_io_error);
        io.or_else(|| cause.downcast_ref().copied())
    })
}

/// Returns whether an error number means that this machine is at fault, whatever the image contains.
pub fn is_of_machine(errno: Errno) -> bool {
    matches!(errno, Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::NOSYS)
}

/// The outermost hint in an error's chain, if there is one.
pub fn hint_of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.hint.clone())
}

/// Returns the same error with one more sentence at the end of its hint.
pub fn with_more_hint(error: anyhow::Error, sentence: &str) -> anyhow::Error {
    let hint = match hint_of(&error) {
        Some(hint) => format!("{hint} {sentence}"),
        None => sentence.to_owned(),
    };
    let (text, several) = (format!("{error:#}"), mistakes_of(&error));
    // The only mistake of an error has the hint of the error.
    let mistakes = match <[Mistake; 1]>::try_from(several) {
        Ok([Mistake { place, .. }]) => vec![Mistake { place, message: text.clone(), hint: None }],
        Err(several) => several,
    };
    Kind::of(&error).failure(text).with_mistakes(mistakes).hint(hint).into()
}

/// The number of mistakes that an error has in addition to [`mistakes_of`], and only counts.
pub fn unlisted_mistakes_of(error: &anyhow::Error) -> usize {
    failure_in(error).map_or(0, |failure| failure.unlisted)
}

/// The mistakes that an error consists of, each with its message and hint. There is at least one: an error whose
/// mistakes are not listed counts as one mistake. Its place is a [`Place`] in the error's chain, if there is one.
pub fn mistakes_of(error: &anyhow::Error) -> Vec<Mistake> {
    let (text, hint) = (format!("{error:#}"), hint_of(error));
    match failure_in(error).map(|failure| (failure, &failure.mistakes[..])) {
        None | Some((_, [])) => {
            vec![Mistake { place: error.downcast_ref::<Place>().cloned(), message: text, hint }]
        }
        Some((_, [only])) => {
            let hint = only.hint.clone().or(hint);
            vec![Mistake { place: only.place.clone(), message: text, hint }]
        }
        Some((failure, several)) => {
            // The contexts apply to each of the mistakes.
            let context = text.strip_suffix(&failure.message).unwrap_or_default();
            let complete = |mistake: &Mistake| Mistake {
                place: mistake.place.clone(),
                message: format!("{context}{}", mistake.message),
                hint: mistake.hint.clone().or(hint.clone()),
            };
            several.iter().map(complete).collect()
        }
    }
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
    use anyhow::{Context, Error};

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
    fn every_mistake_has_its_place_through_contexts() {
        let place = |line| {
            Place::new("web/image.toml".into(), Some(line), Some("disk.iops".into()), "`iops` of [disk]")
        };
        assert_eq!(place(3).to_string(), "web/image.toml:3: `iops` of [disk]");
        let lines = |error: &Error| -> Vec<_> {
            let of = |m: Mistake| (m.place.and_then(|p| p.line), m.message, m.hint);
            mistakes_of(error).into_iter().map(of).collect()
        };
        let hint = Some("Look.".to_owned());
        let one = Kind::Definition.failure(format!("{} is 1", place(3))).at(&place(3)).hint("Look.");
        let one = Error::from(one).context("baking web");
        let message = "baking web: web/image.toml:3: `iops` of [disk] is 1".to_owned();
        assert_eq!(lines(&one), [(Some(3), message, hint.clone())]);
        let mistake = |line, hint| Mistake { place: Some(place(line)), message: format!("no {line}"), hint };
        let two = Kind::Definition
            .failure("no 3\nno 4")
            .with_mistakes(vec![mistake(3, None), mistake(4, hint.clone())]);
        let two = Error::from(two).context("baking web");
        let expected =
            [(Some(3), "baking web: no 3".into(), None), (Some(4), "baking web: no 4".into(), hint)];
        assert_eq!(lines(&two), expected);
        let context = Kind::NotFound.error("not found").context(place(5)).context("planning");
        let message = "planning: web/image.toml:5: `iops` of [disk]: not found".to_owned();
        assert_eq!(lines(&context), [(Some(5), message, None)]);
        assert_eq!(lines(&anyhow::anyhow!("?")), [(None, "?".into(), None)]);
    }

    #[test]
    fn a_sentence_is_added_to_a_hint() {
        let place = Place::new("web/image.toml".into(), Some(3), None, "");
        let plain = Kind::Step.failure("no").at(&place);
        let error = with_more_hint(Error::from(plain).context("testing"), "Look.");
        let one = |hint: &str| {
            let (place, message) = (Some(place.clone()), "testing: no".to_owned());
            vec![Mistake { place, message, hint: Some(hint.to_owned()) }]
        };
        assert_eq!(mistakes_of(&error), one("Look."));
        let error = with_more_hint(error, "Ask.");
        assert_eq!((hint_of(&error).as_deref(), Kind::of(&error)), (Some("Look. Ask."), Kind::Step));
        assert_eq!((mistakes_of(&error), format!("{error:#}")), (one("Look. Ask."), "testing: no".into()));
    }

    #[test]
    fn mistakes_that_are_only_counted_have_no_object() {
        let mistake = |n| Mistake { place: None, message: format!("no {n}"), hint: None };
        let error =
            Error::from(Kind::Definition.failure_of(vec![mistake(1), mistake(2)], 3)).context("baking");
        assert_eq!(format!("{error:#}"), "baking: no 1\nno 2\nand 3 more");
        let messages: Vec<_> = mistakes_of(&error).into_iter().map(|mistake| mistake.message).collect();
        assert_eq!(messages, ["baking: no 1", "baking: no 2"]);
        assert_eq!(unlisted_mistakes_of(&error), 3);
        let error = Error::from(Kind::Definition.failure_of(vec![mistake(1)], 0));
        assert_eq!((error.to_string().as_str(), unlisted_mistakes_of(&error)), ("no 1", 0));
    }

    #[test]
    fn an_unknown_failure_is_this_machines_unless_it_is_known_better() {
        assert_eq!(Kind::of(&anyhow::anyhow!("?")), Kind::Machine);
        let error = Kind::Step.unless_known(anyhow::anyhow!("?").context("asking"));
        assert_eq!((Kind::of(&error), format!("{error:#}")), (Kind::Step, "asking: ?".into()));
        let error = Kind::Step.unless_known(Kind::Machine.failure("no loop").hint("Load it.").into());
        assert_eq!((Kind::of(&error), hint_of(&error).as_deref()), (Kind::Machine, Some("Load it.")));
        let error = anyhow::anyhow!("gone").context(Kind::Cloud.failure("refused")).context("taking");
        assert_eq!((Kind::of(&error), format!("{error:#}")), (Kind::Cloud, "taking: refused: gone".into()));
    }

    #[test]
    fn an_error_of_the_disk_is_not_the_images() {
        let kind = |errno: Errno| {
            let io = anyhow::Error::from(std::io::Error::from(errno)).context("reading /etc/fstab");
            let plain = anyhow::Error::from(errno).context("reading /etc/fstab");
            let [io, plain] = [io, plain].map(|error| Kind::of(&Kind::Definition.unless_machine(error)));
            assert_eq!(io, plain);
            io
        };
        for errno in [Errno::IO, Errno::NOMEM, Errno::MFILE, Errno::NFILE] {
            assert_eq!(kind(errno), Kind::Machine, "{errno}");
        }
        for errno in [Errno::LOOP, Errno::PERM, Errno::UCLEAN, Errno::BADMSG, Errno::NAMETOOLONG] {
            assert_eq!(kind(errno), Kind::Definition, "{errno}");
        }
        let known = Kind::Step.unless_machine(Kind::Cloud.error("refused"));
        assert_eq!(Kind::of(&known), Kind::Cloud);
    }

    #[test]
    fn what_fails_before_any_step_is_the_bases() {
        let step = Error::from(Kind::Step.failure("status 1").hint("Look.")).context("listing packages");
        let ran = Kind::of_base(Kind::Step.failure("too much memory").after_start().into());
        assert_eq!(Kind::of(&ran), Kind::Step);
        let error = Kind::of_base(step);
        assert_eq!((Kind::of(&error), hint_of(&error).as_deref()), (Kind::Definition, Some("Look.")));
        assert_eq!(format!("{error:#}"), "listing packages: status 1");
        assert_eq!(Kind::of(&Kind::of_base(Kind::Machine.error("no loop"))), Kind::Machine);
    }
}
