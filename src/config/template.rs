//! `[[file]] template = true`: a file in which `{{ name }}` stands for a variable of the definition.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// The maximal size of a template in bytes. Nobody writes a larger one by hand.
const MAX_BYTES: u64 = 1 << 20;
/// The maximal number of instructions that the template engine executes for a template. This many instructions take
/// less than a second. Usual templates need far fewer, even if they have the maximal size.
const FUEL: u64 = 1_000_000;

/// Renders a template. `source` is its text. Errors name `path` and the line.
pub fn render(source: &str, path: &Path, vars: &Variables) -> Result<String, String> {
    let mut engine = Environment::new();
    engine.set_undefined_behavior(UndefinedBehavior::Strict);
    engine.set_auto_escape_callback(|_| AutoEscape::None);
    // A line that only contains `{% … %}` is removed, as in Ansible's templates.
    let syntax =
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build();
    engine.set_syntax(syntax.map_err(|error| error.to_string())?);
    engine.set_fuel(Some(FUEL));
    engine.set_debug(true); // with this, an error has its position in the text
    let values = vars.iter().map(|(name, value)| (name.as_str(), Value::from(value.as_str())));
    engine.render_named_str("template", source, Value::from(values.collect::<BTreeMap<_, _>>())).map_err(
        |error| {
            let line = error.line().unwrap_or(1);
            let expression = error.range().and_then(|range| source.get(range)).unwrap_or_default().trim();
            let what = match (error.kind(), error.detail()) {
                (ErrorKind::UndefinedError, _) => {
                    format!("`{expression}` is not defined: {}", list_variables(vars))
                }
                (ErrorKind::OutOfFuel, _) => "it takes too long to render".into(),
                (_, Some(detail)) => detail.to_owned(),
                (kind, None) => kind.to_string(),
            };
            format!("{}:{line}: {what}", path.display())
        },
    )
}

fn list_variables(vars: &Variables) -> String {
    let names: Vec<_> = vars.keys().map(|name| format!("`{name}`")).collect();
    match names.is_empty() {
        true => "[vars] of image.toml declares no variable".into(),
        false => format!("[vars] of image.toml declares {}", names.join(", ")),
    }
}

/// Reads a template. Fails if it is larger than 1 MiB, or is not UTF-8.
pub fn read(file: &mut impl Read, path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let shown = path.display();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("{shown}: cannot be read: {e}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("{shown}: is larger than 1 MiB, the limit of a template"));
    }
    String::from_utf8(bytes).map_err(|_| format!("{shown}: is not valid UTF-8"))
}

/// Checks that a file can be rendered. The caller writes the key of image.toml before the error, and both form one
/// sentence.
pub fn check(path: &Path, vars: &Variables) -> Result<(), String> {
    let opened = std::fs::File::open(path).map_err(|e| format!("{}: cannot be read: {e}", path.display()));
    let rendered =
        opened.and_then(|mut file| read(&mut file, path)).and_then(|text| render(&text, path, vars));
    rendered.map(|_| ()).map_err(|what| format!("cannot be rendered as a template: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(text: &str) -> Result<String, String> {
        let vars = [("port", "8080"), ("name", "a & <b>"), ("debug", "")];
        let vars: Variables = vars.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        render(text, Path::new("files/site.html"), &vars)
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

    #[test]
    fn large_or_binary_files_are_refused() {
        let path = Path::new("x");
        assert!(read(&mut &b"\xff"[..], path).unwrap_err().contains("UTF-8"));
        assert!(read(&mut std::io::repeat(b'a'), path).unwrap_err().contains("1 MiB"));
    }
}
