//! `[vars]`: variables for the environment of scripts and for templates, and the rules for their names.

use crate::config::key_table::{ANY_TEXT, TextRule};
use crate::config::toml_reader::Table;
use std::collections::BTreeMap;
use toml::de::DeValue;

/// Values of variables from the command line (`--var NAME=VALUE`), by name.
pub type GivenVars = BTreeMap<String, String>;

/// A definition's variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vars {
    /// The defaults in `[vars]`.
    pub declared: BTreeMap<String, String>,
    /// Values from the command line, which override defaults. The map contains only declared variables.
    pub given: GivenVars,
    /// Whether `[vars]` has a mistake. Then `declared` is incomplete, and what a template lacks may only follow from it.
    pub has_mistakes: bool,
}

impl Vars {
    pub(crate) fn read(top: &Table, given: &GivenVars) -> Self {
        let mut declared = BTreeMap::new();
        let mut has_mistakes = top.misspells("vars");
        let table = top.user_table("vars");
        has_mistakes |= table.is_none() && top.has("vars");
        if let Some(table) = table {
            for (name, value) in table.entries() {
                let shown = name.value.escape_debug().to_string();
                let good = table.check(&shown, name.line, free_name(name.value)).is_some();
                let DeValue::String(text) = value.value else {
                    table.wrong_type::<()>(&shown, &value, "a quoted string");
                    has_mistakes = true;
                    continue;
                };
                if table.check(&shown, value.line, plain(text)).is_some() && good {
                    declared.insert(name.value.to_owned(), text.to_string());
                } else {
                    has_mistakes = true;
                }
            }
        }
        let given = given.iter().filter(|(name, _)| declared.contains_key(*name));
        let given = given.map(|(name, value)| (name.clone(), value.clone())).collect();
        Self { given, declared, has_mistakes }
    }

    /// The value of each variable: the command line's value, or else the default.
    pub fn values(&self) -> BTreeMap<String, String> {
        let mut values = self.declared.clone();
        values.extend(self.given.clone());
        values
    }

    pub fn is_empty(&self) -> bool {
        self.declared.is_empty()
    }
}

/// Parses `NAME=VALUE` of the command line.
pub fn given(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is expected")?;
    variable_name(name).map_err(|what| format!("{name:?} {what}"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Checks that a shell accepts this name of a variable.
pub(crate) fn variable_name(name: &str) -> Result<(), String> {
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if good {
        return Ok(());
    }
    Err("is not a valid variable name: use ASCII letters, digits and `_`, and do not begin with a digit"
        .into())
}

/// Names of variables that change how the programs of a step behave. If a user set them, the programs might fail. A
/// name with `*` stands for all names that begin with the text before `*`. `AWS_*` is reserved, because such
/// variables are the builder's credentials, or programs would take them for credentials. The list also applies to
/// `secrets`, so a definition cannot request the builder's credentials. `OVEN_*` is reserved, because oven itself sets such variables.
pub(super) const RESERVED: [&str; 32] = [
    "BASHOPTS",
    "BASH_ENV",
    "CDPATH",
    "ENV",
    "GLOBIGNORE",
    "HOME",
    "IFS",
    "LANG",
    "LANGUAGE",
    "LOGNAME",
    "OLDPWD",
    "PATH",
    "PS4",
    "PWD",
    "SHELL",
    "SHELLOPTS",
    "SYSTEMD_OFFLINE",
    "TERM",
    "TMPDIR",
    "USER",
    "container",
    "debian_chroot",
    "ANSIBLE_*",
    "APT_*",
    "AWS_*",
    "BASH_FUNC*",
    "DEBIAN_*",
    "DPKG_*",
    "LC_*",
    "LD_*",
    "OVEN_*",
    "PYTHON*",
];

/// Checks the name of a variable that every script gets. Refuses the names in `RESERVED`.
pub(crate) fn free_name(name: &str) -> Result<(), String> {
    variable_name(name)?;
    if (TextRule { reserved: &RESERVED, ..ANY_TEXT }).is_reserved(name) {
        return Err(
            "cannot be a variable, because it changes how programs behave; choose another name (the `env` of a \
             single [[run]] may set it)"
                .into(),
        );
    }
    Ok(())
}

/// Checks that a value can be an environment variable's value or an argument.
pub(crate) fn plain(value: &str) -> Result<(), String> {
    if value.contains('\0') { Err("has a NUL character".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["version", "VERSION_2", "_x", "path", "ANSIBLE", "home"] {
            assert_eq!(free_name(name), Ok(()), "{name}");
        }
        for name in ["", "2nd", "a-b", "a b", "é", "a.b", "a="] {
            assert!(variable_name(name).is_err(), "{name}");
        }
        for name in ["PATH", "LD_PRELOAD", "AWS_SECRET_ACCESS_KEY", "OVEN_NAME", "BASH_ENV", "PYTHONPATH"] {
            assert!(free_name(name).unwrap_err().contains("cannot be a variable"), "{name}");
        }
    }

    #[test]
    fn the_command_lines_values_may_hold_anything() {
        assert_eq!(given("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(given("a="), Ok(("a".into(), String::new())));
        assert_eq!(given("a"), Err("NAME=VALUE is expected".into()));
        assert!(given("=x").unwrap_err().starts_with("\"\" is not a valid variable name"));
    }
}
