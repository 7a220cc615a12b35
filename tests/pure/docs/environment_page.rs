//! The table of the environment variables that oven reads. It is a part of a page that is written by hand.

use super::root;
use crate::layers::rust_files;
use clap::CommandFactory;
use oven::cli::args::Cli;
use oven::cli::args::environment::{ENVIRONMENT, EnvironmentVariables, list};
use std::collections::BTreeSet;
use std::fmt::Write;

const PAGE: &str = "docs/reference/environment.md";
const BEGIN: &str = "<!-- Generated: `OVEN_BLESS=1 cargo test --test pure docs` writes this table from src/cli/args/environment.rs. -->";
const END: &str = "<!-- End of the generated table -->";

/// These variables are read by libraries, so their names are not in the sources.
const OF_LIBRARIES: [&str; 18] = [
    "COLUMNS",
    "HOME",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_ENDPOINT_URL",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
];
const OF_METADATA_CLIENT: [&str; 2] =
    ["AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"];
/// In these files, the name of the variable is not a literal in the call. In the first three, a definition names
/// the variables: they are the secrets. In the others, each name is a literal elsewhere in the file.
const SECRETS: [&str; 3] = ["src/bake/secrets.rs", "src/cli/plan.rs", "src/cli/shell.rs"];
const BY_NAME: [&str; 2] = ["src/report/screen.rs", "src/cloud/aws/imds/mod.rs"];

pub fn page() -> String {
    let page = std::fs::read_to_string(root().join(PAGE)).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect(BEGIN);
    let (_, after) = rest.split_once(END).expect(END);
    let mut table = "| variable | flag | meaning |\n|---|---|---|\n".to_owned();
    for EnvironmentVariables { names, flag, meaning } in ENVIRONMENT {
        let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        let flag = flag.map(|flag| format!("`{flag}`")).unwrap_or_default();
        _ = writeln!(table, "| {} | {flag} | {meaning} |", names.join(", "));
    }
    format!("{before}{BEGIN}\n\n{table}\n{END}{after}")
}

/// Returns the variables that a source reads, and the places that are not understood.
fn variables_of(file: &str, text: &str) -> (BTreeSet<String>, Vec<String>) {
    let (mut found, mut unknown) = (BTreeSet::new(), Vec::new());
    // A test module at the end of a file does not count. One in another file is `mod tests;`.
    let is_block = |at: &usize| text[*at..].lines().nth(1).is_some_and(|line| line.ends_with('{'));
    let tests = text.match_indices("#[cfg(test)]\nmod ").map(|(at, _)| at).find(is_block);
    let text = &text[..tests.unwrap_or(text.len())];
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let is_name = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_uppercase())
            && word.len() > 1
            && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    for call in
        ["env::var(", "env::var_os(", "env::vars(", "env::vars_os(", "env::temp_dir(", "env::home_dir("]
    {
        for (at, _) in code.match_indices(call) {
            let argument = code[at + call.len()..].trim_start();
            let literal = argument.strip_prefix('"').and_then(|rest| rest.split('"').next());
            match (call, literal) {
                ("env::temp_dir(", _) => _ = found.insert("TMPDIR".to_owned()),
                (_, Some(name)) => _ = found.insert(name.to_owned()),
                _ if SECRETS.contains(&file) || BY_NAME.contains(&file) => {}
                _ => unknown.push(format!("{file}: {call}{}", argument.lines().next().unwrap_or_default())),
            }
        }
    }
    if BY_NAME.contains(&file) {
        found.extend(code.split('"').skip(1).step_by(2).filter(|word| is_name(word)).map(str::to_owned));
    }
    (found, unknown)
}

#[test]
fn docs_every_environment_variable_has_a_row() {
    let mut read = BTreeSet::new();
    for file in rust_files(&root().join("src")) {
        let name = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let is_test = |part: &str| ["test", "tests", "fake"].contains(&part.trim_end_matches(".rs"));
        if name.split('/').any(is_test) {
            continue;
        }
        let (found, unknown) = variables_of(&name, &std::fs::read_to_string(&file).unwrap());
        assert_eq!(
            unknown,
            Vec::<String>::new(),
            "name the variable in the call, or add the file to this test"
        );
        read.extend(found);
    }
    let command = Cli::command();
    for arg in command.get_arguments() {
        let Some(variable) = arg.get_env().map(|name| name.to_str().unwrap()) else { continue };
        let row = ENVIRONMENT.iter().find(|row| row.names == [variable]);
        let flag = row.and_then(|row| row.flag);
        assert_eq!(flag, Some(format!("--{}", arg.get_long().unwrap()).as_str()), "the row of {variable}");
        read.insert(variable.to_owned());
    }
    let libraries = OF_LIBRARIES.iter().chain(&OF_METADATA_CLIENT).map(|name| (*name).to_owned());
    read.extend(libraries);
    let rows: Vec<_> = ENVIRONMENT.iter().flat_map(|row| row.names).map(|name| (*name).to_owned()).collect();
    let documented: BTreeSet<_> = rows.iter().cloned().collect();
    assert_eq!(documented, read, "src/cli/args/environment.rs has a row for each variable that oven reads");
    assert_eq!(rows.len(), documented.len(), "a variable has one row");
    for row in ENVIRONMENT {
        let is_known =
            |flag: &str| command.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--"));
        assert!(row.flag.is_none_or(is_known), "{:?}", row.names);
    }
    let help = list();
    assert!(documented.iter().all(|name| help.contains(name.as_str())), "{help}");
}

#[test]
fn docs_a_new_environment_variable_is_found() {
    let found = |file: &str, text: &str| variables_of(file, text);
    for text in [
        "let x = std::env::var(\"OVEN_NEW\");",
        "let x = env::var_os(\n    \"OVEN_NEW\",\n);",
        "use std::env;\nlet x = env::var(\"OVEN_NEW\").ok();\n#[cfg(test)]\nmod tests {}",
    ] {
        assert_eq!(found("src/x.rs", text), (BTreeSet::from(["OVEN_NEW".to_owned()]), Vec::new()), "{text}");
    }
    assert_eq!(found("src/x.rs", "env::var(name)").1.len(), 1);
    assert_eq!(found("src/x.rs", "for (name, value) in std::env::vars() {").1.len(), 1);
    assert!(found("src/x.rs", "std::env::temp_dir()").0.contains("TMPDIR"));
    assert!(found("src/report/screen.rs", "variable(\"OVEN_NEW\")").0.contains("OVEN_NEW"));
    assert_eq!(found("src/x.rs", "// env::var(\"OVEN_NEW\")"), Default::default());
}
