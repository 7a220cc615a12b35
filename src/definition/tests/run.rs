//! `[[run]]`, `[[ansible]]`, `[[test]]`, `[vars]` and templates.

use super::*;

const BASE: &str = "from = \"ami-0123456789abcdef0\"\n";

/// A tree with a playbook, tests and templates next to image.toml.
fn top() -> tempfile::TempDir {
    let top = tree();
    let write = |path: &str, text: &str| std::fs::write(top.path().join("web").join(path), text).unwrap();
    write("site.yml", "- hosts: all\n");
    write("web.bats", "@test x { true; }\n");
    write("good.conf", "port {{ port }}\n");
    write("bad.conf", "\nport {{ prot }}\n");
    top
}

#[test]
fn all_that_a_script_can_say() {
    let top = top();
    let toml = format!(
        "{BASE}[vars]\nport = \"80\"\n\n[[run]]\nscript = \"setup.sh\"\nargs = [\"a b\", \"\"]\nretries = 2\n\
         secrets = [\"TOKEN\"]\nenv = {{ A = \"1\", PATH = \"/opt\" }}\n\n[[ansible]]\nplaybook = \"site.yml\"\ntags = [\"x\"]\n\
         [ansible.vars]\nn = 0x10\nf = 1.5\nlist = [true, \"a\"]\nday = 2020-01-02\n\n[[run]]\ncommand = [\"systemctl\", \
         \"enable\"]\nnetwork = true\ntimeout = 5\n\n[[test]]\nbats = \"web.bats\"\nargs = [\"--tap\"]\n"
    );
    let web = load(top.path(), &toml).unwrap();
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let plain = |kind, line, program| Script {
        kind,
        line,
        program,
        args: Vec::new(),
        env: BTreeMap::new(),
        secrets: Vec::new(),
        network: false,
        retries: 0,
        timeout: 3600,
    };
    let setup = Script {
        args: texts(&["a b", ""]),
        env: [("A", "1"), ("PATH", "/opt")].map(|(n, v)| (n.into(), v.into())).into(),
        secrets: texts(&["TOKEN"]),
        retries: 2,
        ..plain(ScriptKind::Run, 5, Program::Script("setup.sh".into()))
    };
    let vars = serde_json::json!({"n": 16, "f": 1.5, "list": [true, "a"], "day": "2020-01-02"});
    let playbook = Playbook {
        path: "site.yml".into(),
        vars: serde_json::from_value(vars).unwrap(),
        tags: texts(&["x"]),
    };
    let command = Script {
        network: true,
        timeout: 5,
        ..plain(ScriptKind::Run, 21, Program::Command(texts(&["systemctl", "enable"])))
    };
    // Scripts and playbooks are in the order of the file.
    assert_eq!(web.runs, [setup, plain(ScriptKind::Ansible, 12, Program::Playbook(playbook)), command]);
    let bats = plain(ScriptKind::Test, 26, Program::Bats("web.bats".into()));
    assert_eq!(web.tests, [Script { args: texts(&["--tap"]), ..bats }]);
}

#[test]
fn a_variable_is_what_the_command_line_says() {
    let top = top();
    let toml = format!(
        "{BASE}[vars]\nport = \"80\"\nname = \"\"\n[[file]]\nsource = \"good.conf\"\ntarget = \"/a\"\ntemplate = true\n"
    );
    let web = load(top.path(), &toml).unwrap();
    assert!(web.files[0].template);
    assert_eq!(web.vars.values(), [("name", ""), ("port", "80")].map(|(n, v)| (n.into(), v.into())).into());
    let given: GivenVars = [("port", "8080"), ("other", "1")].map(|(n, v)| (n.into(), v.into())).into();
    let web = Definition::load_with(&top.path().join("web"), &given).unwrap();
    assert_eq!(web.vars.values()["port"], "8080");
    assert_eq!(web.vars.given.len(), 1, "what it does not declare is another definition's");
}

#[test]
fn each_mistake_has_its_place() {
    let top = top();
    for (toml, expected) in [
        (
            "[[run]]\nscript = \"setup.sh\"\ncommand = [\"x\"]",
            "4: [[run]] has both `script` and `command`: use only one",
        ),
        ("[[run]]\ntimeout = 5", "2: [[run]] needs one of: `script`, `command`"),
        ("[[run]]\nbats = \"web.bats\"", "3: unknown key `bats` of [[run]]"),
        (
            "[[run]]\ncommand = \"ls\"",
            "3: `command` of [[run]] is a string: it should be an array of a program",
        ),
        ("[[run]]\ncommand = []", "3: `command` of [[run]] names no program"),
        ("[[run]]\ncommand = [\"\"]", "3: `command` of [[run]] names no program"),
        ("[[run]]\ncommand = [\"ls\", 1]", "3: `command` of [[run]] has an integer"),
        (
            "[[run]]\ncommand = [\"ls\"]\nargs = [\"-l\"]",
            "4: `args` of [[run]] cannot be used with `command`: put the arguments into `command`",
        ),
        (
            "[[run]]\nscript = \"setup.sh\"\nargs = \"x\"",
            "4: `args` of [[run]] is a string: it should be an array of strings",
        ),
        ("[[run]]\nscript = \"setup.sh\"\nargs = [\"a\\u0000\"]", "4: `args` of [[run]] has a NUL"),
        (
            "[[run]]\nscript = \"setup.sh\"\nretries = 21",
            "4: `retries` of [[run]] is 21: it should be 0 to 20 retries",
        ),
        (
            "[[run]]\nscript = \"setup.sh\"\n[run.env]\n2a = \"x\"",
            "5: `2a` of [run.env] is not a valid variable name",
        ),
        (
            "[[run]]\nscript = \"setup.sh\"\nenv = { OVEN_NAME = \"x\" }",
            "4: `OVEN_NAME` of [run.env] is reserved for oven",
        ),
        ("[[run]]\nscript = \"setup.sh\"\nenv = { A = 1 }", "4: `A` of [run.env] is an integer"),
        (
            "[[test]]\nscript = \"setup.sh\"\nenv = [\"A=1\"]",
            "4: `env` of [[test]] is an array: it should be a table: [test.env]",
        ),
        (
            "[[run]]\nscript = \"setup.sh\"\nsecrets = [\"AWS_SECRET_ACCESS_KEY\"]",
            "4: `secrets` of [[run]] has AWS_SECRET_ACCESS_KEY, which cannot be a variable",
        ),
        ("[[run]]\nscript = \"setup.sh\"\nsecrets = [\"A\", \"A\"]", "4: `secrets` of [[run]] has A twice"),
        (
            "[[run]]\nscript = \"setup.sh\"\nsecrets = [\"A\"]\nenv = { A = \"1\" }",
            "4: `secrets` of [[run]] has A, which is also in `env`",
        ),
        (
            "[vars]\nA = \"\"\n[[run]]\nscript = \"setup.sh\"\nsecrets = [\"A\"]",
            "6: `secrets` of [[run]] has A, which is also in [vars]",
        ),
        ("[[ansible]]\ntags = [\"x\"]", "2: `playbook` of [[ansible]] is missing"),
        (
            "[[ansible]]\nplaybook = \"gone.yml\"",
            "3: `playbook` of [[ansible]] names \"gone.yml\", but DIR/web/gone.yml does not exist",
        ),
        (
            "[[ansible]]\nplaybook = \"site.yml\"\nscript = \"setup.sh\"",
            "4: unknown key `script` of [[ansible]]",
        ),
        (
            "[[ansible]]\nplaybook = \"site.yml\"\nvars = \"x\"",
            "4: `vars` of [[ansible]] is a string: it should be a table: [ansible.vars]",
        ),
        (
            "[[ansible]]\nplaybook = \"site.yml\"\nvars = { x = inf }",
            "4: `x` of [ansible.vars] is a number that JSON cannot represent",
        ),
        (
            "[[ansible]]\nplaybook = \"site.yml\"\nvars = { \"a-b\" = 1 }",
            "4: `a-b` of [ansible.vars] is not a valid variable name",
        ),
        (
            "[[test]]\nbats = \"../outside/script\"",
            "3: `bats` of [[test]] is \"../outside/script\", which is outside",
        ),
        ("[vars]\nport = 80", "3: `port` of [vars] is an integer: it should be a quoted string"),
        (
            "[vars]\nPATH = \"x\"",
            "3: `PATH` of [vars] cannot be a variable, because it changes how programs behave",
        ),
        ("[vars]\n\"a b\" = \"x\"", "3: `a b` of [vars] is not a valid variable name"),
        ("vars = 1", "2: `vars` is an integer: it should be a table: [vars]"),
        (
            "[[file]]\nsource = \"bad.conf\"\ntarget = \"/a\"\ntemplate = true\n[vars]\nport = \"80\"",
            "3: `source` of [[file]] cannot be rendered as a template: DIR/web/bad.conf:2: `prot` is not defined: [vars] of image.toml declares `port`",
        ),
        (
            "[[file]]\nsource = \"bad.conf\"\ntarget = \"/a\"\ntemplate = 1",
            "5: `template` of [[file]] is an integer",
        ),
    ] {
        let error = load(top.path(), &format!("{BASE}{toml}\n")).unwrap_err();
        assert!(error.contains(&format!("DIR/web/image.toml:{expected}")), "{toml}\n{error}");
    }
    // If somebody writes a secret's value instead of its name, the error does not show the value.
    let toml = format!("{BASE}[[run]]\nscript = \"setup.sh\"\nsecrets = [\"hunter2!\"]\n");
    let error = load(top.path(), &toml).unwrap_err();
    assert!(
        error.contains("image.toml:4: `secrets` of [[run]] has an element that is not a valid variable name"),
        "{error}"
    );
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn a_mistyped_key_is_not_reported_as_missing_too() {
    let top = top();
    for (toml, expected) in [
        (
            format!("{BASE}[[run]]\nbats = \"web.bats\"\n"),
            "3: unknown key `bats` of [[run]]: the valid keys are `args`",
        ),
        (
            format!("{BASE}[[test]]\nscrpt = \"setup.sh\"\n"),
            "3: unknown key `scrpt` of [[test]]: did you mean `script`?",
        ),
        ("from = { nam = \"debian\" }\n".to_owned(), "1: unknown key `nam` of `from`: did you mean `name`?"),
        (format!("{BASE}[[test]]\ntimeout = 5\n"), "2: [[test]] needs one of: `script`, `command`, `bats`"),
    ] {
        let error = load(top.path(), &toml).unwrap_err();
        assert_eq!(error.lines().count(), 1, "{toml}\n{error}");
        assert!(error.starts_with(&format!("DIR/web/image.toml:{expected}")), "{toml}\n{error}");
    }
}
