//! `[[file]] template = true`: a file in which `{{ name }}` stands for a variable of the definition.

mod limited_child;

use crate::error::Kind;
use crate::sys::fds::{PathRefusal, open_file_within};
use crate::text::{escape_name, list_first};
use anyhow::Error;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// The maximal size of a template in bytes. Nobody writes a larger one by hand.
const MAX_BYTES: u64 = 1 << 20;
/// The maximal number of instructions that the template engine executes for a template. This many instructions take
/// less than a second. Usual templates need far fewer, even if they have the maximal size.
const FUEL: u64 = 1_000_000;
/// The maximal size of a rendered file in bytes. Configuration files are far smaller.
const MAX_RESULT_BYTES: usize = 4 << 20;
/// The maximal number of variables that an error lists.
const MAX_LISTED: usize = 20;
/// The maximal number of characters of the template that an error shows.
const MAX_SHOWN: usize = 200;

/// The reason why a template cannot be rendered.
#[derive(Debug)]
pub enum TemplateError {
    /// The template is wrong. The text names its file, and the line if it is known.
    Mistake(String),
    /// This machine failed, or a signal asked this process to end.
    Failure(Error),
}

impl TemplateError {
    /// Adds a text before a mistake. `describe` gets the mistake.
    pub fn or_mistake<F: Into<Error>>(self, describe: impl FnOnce(String) -> F) -> Error {
        match self {
            Self::Mistake(what) => describe(what).into(),
            Self::Failure(error) => error,
        }
    }
}

/// Renders a template. `source` is its text. Mistakes name `path` and the line, if the line is known.
///
/// The engine runs in a child process with limits (`limited_child`), because the text may come from a stranger.
pub fn render(source: &str, path: &Path, vars: &Variables) -> Result<String, TemplateError> {
    let shown = escape_name(path);
    // The engine is made here, because this initializes its tables. Several threads may do this at the same time, and a
    // child must not find the tables half-initialized.
    let engine = engine().map_err(|error| TemplateError::Failure(Kind::Machine.error(error)))?;
    let rendered = limited_child::run(|| render_here(&engine, source, vars));
    let rendered =
        rendered.map_err(|error| TemplateError::Failure(error.context(format!("rendering {shown}"))))?;
    // The child's errors begin with the number of the line, if it is known.
    rendered.map_err(|what| match what.split_once(':') {
        Some((line, _)) if line.bytes().all(|b| b.is_ascii_digit()) => {
            TemplateError::Mistake(format!("{shown}:{what}"))
        }
        _ => TemplateError::Mistake(format!("{shown}: {what}")),
    })
}

fn engine() -> Result<Environment<'static>, minijinja::Error> {
    let mut engine = Environment::new();
    engine.set_undefined_behavior(UndefinedBehavior::Strict);
    engine.set_auto_escape_callback(|_| AutoEscape::None);
    // A line that only contains `{% … %}` is removed, as in Ansible's templates.
    let syntax =
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build()?;
    engine.set_syntax(syntax);
    engine.set_fuel(Some(FUEL));
    engine.set_debug(true); // with this, an error has its position in the text
    Ok(engine)
}

/// Renders in this process. An error is `LINE: WHAT`.
fn render_here(engine: &Environment, source: &str, vars: &Variables) -> Result<String, String> {
    let values = vars.iter().map(|(name, value)| (name.as_str(), Value::from(value.as_str())));
    let values = Value::from(values.collect::<BTreeMap<_, _>>());
    let mut result = LimitedText { bytes: Vec::new(), is_full: false };
    let rendered = engine
        .template_from_named_str("template", source)
        .and_then(|template| template.render_captured_to(values, &mut result).map(|_| ()));
    match rendered {
        Ok(()) => String::from_utf8(result.bytes).map_err(|_| "1: the result is not valid UTF-8".into()),
        Err(error) => Err(describe(&error, source, vars, result.is_full)),
    }
}

fn describe(error: &minijinja::Error, source: &str, vars: &Variables, is_full: bool) -> String {
    let line = error.line().unwrap_or(1);
    let expression = error.range().and_then(|range| source.get(range)).unwrap_or_default().trim();
    let what = match (error.kind(), error.detail()) {
        _ if is_full => format!("the result is larger than {} MiB", MAX_RESULT_BYTES >> 20),
        (ErrorKind::UndefinedError, _) => {
            format!(
                "`{}` is not defined: {}",
                first_characters(&escape_name(expression)),
                list_variables(vars)
            )
        }
        (ErrorKind::OutOfFuel, _) => limited_child::too_long(),
        (_, Some(detail)) => first_characters(&escape_name(detail)),
        (kind, None) => kind.to_string(),
    };
    format!("{line}: {what}")
}

/// The beginning of a text that may be very long.
fn first_characters(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

/// A text that does not become larger than [`MAX_RESULT_BYTES`].
struct LimitedText {
    bytes: Vec<u8>,
    is_full: bool,
}

impl Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.is_full |= bytes.len() > MAX_RESULT_BYTES - self.bytes.len();
        if self.is_full {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn list_variables(vars: &Variables) -> String {
    let names: Vec<_> = vars.keys().map(|name| format!("`{name}`")).collect();
    match names.is_empty() {
        true => "[vars] of image.toml declares no variable".into(),
        false => format!("[vars] of image.toml declares {}", list_first(&names, MAX_LISTED, ", ")),
    }
}

/// Reads a template. Fails if it is larger than 1 MiB, or is not UTF-8.
pub fn read(file: &mut impl Read, path: &Path) -> Result<String, TemplateError> {
    let mut bytes = Vec::new();
    let shown = escape_name(path);
    let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| refused(path, &PathRefusal::Io(error)))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(TemplateError::Mistake(format!(
            "{shown}: is larger than 1 MiB, the limit of a template"
        )));
    }
    String::from_utf8(bytes).map_err(|_| TemplateError::Mistake(format!("{shown}: is not valid UTF-8")))
}

fn refused(path: &Path, refused: &PathRefusal) -> TemplateError {
    let what = format!("{}: {refused}", escape_name(path));
    match refused.kind() {
        Kind::Definition => TemplateError::Mistake(what),
        kind => TemplateError::Failure(kind.error(what)),
    }
}

/// Checks that the templates of a definition can be rendered.
#[derive(Default)]
pub struct Checker {
    failure: RefCell<Option<Error>>,
}

impl Checker {
    /// Checks that a file can be rendered. `project` is the canonical path of the directory that must contain the file.
    /// The caller writes the key of image.toml before the error, and both form one sentence. A failure that is not a
    /// mistake is stored. The caller gets it from [`Self::into_failure`], and no other template is checked.
    pub fn check(&self, path: &Path, project: &Path, vars: &Variables) -> Result<(), String> {
        if self.failure.borrow().is_some() {
            return Ok(());
        }
        match self.check_one(path, project, vars) {
            Ok(()) => Ok(()),
            Err(TemplateError::Mistake(what)) => Err(format!("cannot be rendered as a template: {what}")),
            Err(TemplateError::Failure(error)) => {
                self.failure.replace(Some(error));
                Ok(())
            }
        }
    }

    fn check_one(&self, path: &Path, project: &Path, vars: &Variables) -> Result<(), TemplateError> {
        let mut file = open_file_within(path, project).map_err(|error| refused(path, &error))?;
        let text = read(&mut file, path)?;
        render(&text, path, vars).map(|_| ())
    }

    /// Fails if this machine failed, or if a signal asked this process to end. Then the other results of the checks mean
    /// nothing.
    pub fn into_failure(self) -> anyhow::Result<()> {
        self.failure.into_inner().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn rendered(text: &str) -> Result<String, String> {
        let vars = [("port", "8080"), ("name", "a & <b>"), ("debug", "")];
        let vars: Variables = vars.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        render(text, Path::new("files/site.html"), &vars).map_err(mistake)
    }

    fn mistake(error: TemplateError) -> String {
        match error {
            TemplateError::Mistake(what) => what,
            TemplateError::Failure(error) => panic!("{error:#}"),
        }
    }

    #[test]
    fn values_are_inserted_unchanged() {
        assert_eq!(rendered("listen {{ port }};\n"), Ok("listen 8080;\n".into()));
        assert_eq!(
            rendered("{{ name }}"),
            Ok("a & <b>".into()),
            "HTML is not escaped, whatever the file's name"
        );
        assert_eq!(rendered("a\n  {% if debug %}\nno\n  {% endif %}\nb\n"), Ok("a\nb\n".into()));
        assert_eq!(rendered("{{ name|upper }} ${x} $(y)"), Ok("A & <B> ${x} $(y)".into()));
        assert_eq!(rendered("{{ missing|default('x') }}"), Ok("x".into()));
        assert_eq!(rendered("{% raw %}{{ x }}{% endraw %}"), Ok("{{ x }}".into()));
    }

    #[test]
    fn a_mistake_has_its_line() {
        for (text, line, what) in [
            (
                "a\nb {{ prot }}\n",
                2,
                "`prot` is not defined: [vars] of image.toml declares `debug`, `name`, `port`",
            ),
            ("\n\n{% if prot %}x{% endif %}", 3, "`prot` is not defined"),
            ("{{ port", 1, "unexpected end of input"),
            ("a\n{% fi %}", 2, "unknown statement fi"),
            ("{{ port|upcase }}", 1, "upcase"),
            (
                "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
                1,
                "takes too long",
            ),
        ] {
            let error = rendered(text).unwrap_err();
            assert!(error.starts_with(&format!("files/site.html:{line}: ")), "{text}: {error}");
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    /// Each of these texts would make the engine allocate gigabytes or compute for minutes, or end this process.
    #[test]
    fn bombs_are_errors() {
        let doubled = "{% set x = x ~ x %}".repeat(40);
        let captured = "{% set x %}{{ x }}{{ x }}{% endset %}".repeat(40);
        let listed = "{% set x = x + x %}".repeat(30);
        let nested = format!("{{{{ {}1{} }}}}", "[".repeat(100_000), "]".repeat(100_000));
        let long = "{{ x ~ x ~ x ~ x }}".repeat(40);
        let texts = [
            "{{ 'a'|indent(99999999999999) }}".to_owned(),
            "{{ ('x'*100000)|replace('x','y'*100000)|length }}".to_owned(),
            "{{ [1]|slice(9999999999)|list|length }}".to_owned(),
            "{{ [1]|batch(9999999999, 0)|list|length }}".to_owned(),
            "{{ '%2000000000d'|format(1) }}".to_owned(),
            "{{ '%.2000000000f'|format(1.0) }}".to_owned(),
            "{{ ('x'*2000000000)|length }}".to_owned(),
            "{{ (([1]*100000)|join('x'*100000))|length }}".to_owned(),
            "{{ ([[1]*1000]*1000*1000)|list|sum(start=[])|length }}".to_owned(),
            "{{ (range(100000)|list*1000*1000)|list|length }}".to_owned(),
            "{{ ('a\n'*1000000)|indent(1000000)|length }}".to_owned(),
            "{{ ('x'*1000000)|list|map('replace', 'x', 'y'*1000000)|list|length }}".to_owned(),
            "{% for a in range(90000) %}{{ 'y' in ('x'*9000000) }}{% endfor %}".to_owned(),
            "{% for a in range(99999) %}{{ 'x'*100000 }}{% endfor %}".to_owned(),
            format!("{{% set x = 'x' %}}{doubled}{{{{ x|length }}}}"),
            format!("{{% set x = 'x' %}}{captured}{{{{ x|length }}}}"),
            format!("{{% set x = [1] %}}{listed}{{{{ x|list|length }}}}"),
            format!("{{% set x = 'x'*1000000 %}}{long}"),
            nested,
        ];
        // The last two are limits of the engine itself.
        let limits = [
            "too much memory",
            "takes too long",
            "is larger than",
            "sequence is too large",
            "exceeds maximum recursion limits",
        ];
        let mut others = Vec::new();
        for text in texts {
            let begin = Instant::now();
            let rendered = rendered(&text);
            let shown: String = text.chars().take(100).collect();
            assert!(begin.elapsed() < Duration::from_secs(20), "{shown} took {:?}", begin.elapsed());
            let error = rendered.expect_err(&shown);
            assert!(error.starts_with("files/site.html:") && error.len() < 400, "{shown}: {error}");
            if !limits.iter().any(|limit| error.contains(limit)) {
                others.push(format!("{shown}: {error}"));
            }
        }
        assert!(others.is_empty(), "these are refused for another reason: {others:#?}");
    }

    #[test]
    fn a_template_of_the_maximal_size_is_rendered() {
        let line = "listen {{ port }} # {{ name|upper }}\n";
        let text = line.repeat(MAX_BYTES as usize / line.len());
        assert_eq!(rendered(&text).unwrap().lines().next(), Some("listen 8080 # A & <B>"));
        assert!(rendered("{{ 'x'*4194304 }}").is_ok());
        assert!(rendered("{{ 'x'*4194305 }}").unwrap_err().contains("the result is larger than 4 MiB"));
    }

    #[test]
    fn large_or_binary_files_are_refused() {
        let path = Path::new("x");
        assert!(mistake(read(&mut &b"\xff"[..], path).unwrap_err()).contains("UTF-8"));
        assert!(mistake(read(&mut std::io::repeat(b'a'), path).unwrap_err()).contains("1 MiB"));
    }

    #[test]
    fn a_template_that_this_machine_cannot_read_is_not_a_mistake() {
        // Reading this file at its beginning fails with EIO.
        let (templates, vars) = (Checker::default(), Variables::new());
        assert_eq!(templates.check(Path::new("/proc/self/mem"), Path::new("/proc"), &vars), Ok(()));
        let error = templates.into_failure().unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert!(error.to_string().starts_with("/proc/self/mem: cannot be read: "), "{error:#}");

        let templates = Checker::default();
        let missing = templates.check(Path::new("/proc/self/missing"), Path::new("/proc"), &vars);
        assert!(missing.unwrap_err().contains("No such file"));
        templates.into_failure().unwrap();
    }
}
