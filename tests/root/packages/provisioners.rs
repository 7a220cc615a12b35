//! The definition's provisioners in a small Debian: arguments, environment, retries, variables, templates, secrets,
//! bats files, and Ansible's playbooks with a stand-in for `ansible-playbook` (the real one: `ansible.rs`). Needs
//! root, mmdebstrap and a mirror of Debian. bats is a stand-in, too: it shows how it is called.

use oven_testing::PackageLab;
use oven_testing::programs::write_program;
use std::fs;
use std::os::unix::fs::PermissionsExt;

const STEP: u8 = 5;
const DEFINITION: u8 = 3;
const TOKEN: &str = "hunter2-\"it's\"-9f8e7d";

/// A lab whose environment has one secret.
fn with_secret() -> PackageLab {
    let mut lab = PackageLab::new();
    lab.environment.insert("TOKEN".into(), TOKEN.into());
    lab
}

/// A program of the image.
fn program(lab: &PackageLab, name: &str, text: &str) {
    let path = lab.image("usr/local/bin").join(name);
    write_program(&path, &format!("#!/bin/sh -e\n{text}\n"));
}

#[test]
fn arguments_environment_and_variables() {
    let mut lab = PackageLab::new();
    lab.given.insert("version".into(), "2 $(id) `x`".into());
    lab.script("setup.sh", "printf '<%s>\\n' \"$@\" \"$version\" \"$mode\" \"$GREETING\" \"$PATH\" >> /told");
    lab.define(
        "[vars]\nversion = \"1\"\nmode = \"fast\"\n[[run]]\nscript = \"setup.sh\"\nargs = [\"a b\", \"\", \"*\", \"$HOME\"]\n\
         [run.env]\nGREETING = \"hello world\"\nmode = \"slow\"\n[[run]]\nscript = \"setup.sh\"\n\
         [[run]]\ncommand = [\"touch\", \"/made by\", \"/$HOME;x\"]\n[[test]]\ncommand = [\"test\", \"-e\", \"/made by\"]\n",
    );
    lab.bake().facts();
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let first = format!("<a b>\n<>\n<*>\n<$HOME>\n<2 $(id) `x`>\n<slow>\n<hello world>\n<{path}>\n");
    assert_eq!(lab.read("told"), format!("{first}<2 $(id) `x`>\n<fast>\n<>\n<{path}>\n"));
    assert!(lab.image("made by").exists() && lab.image("$HOME;x").exists());
}

#[test]
fn a_missing_command_is_reported() {
    let lab = PackageLab::new();
    lab.define("[[run]]\ncommand = [\"no-such-program\", \"x\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("image.toml:3: the [[run]] no-such-program failed"), "{text}");
    assert!(text.contains("exit status 127"), "{text}");
}

#[test]
fn the_third_try_succeeds_and_a_test_may_be_tried_again() {
    let lab = PackageLab::new();
    lab.script("flaky.sh", "echo x >> /tries\ntest $(wc -l < /tries) -ge 3");
    lab.define("[[run]]\nscript = \"flaky.sh\"\nretries = 2\n");
    let baked = lab.bake();
    for words in ["retrying in 2 s", "retrying in 4 s"] {
        assert!(baked.log.contains(words), "{words}: {}", baked.log);
    }
    baked.facts();
    assert_eq!(lab.read("tries"), "x\nx\nx\n");
    // What a test wrote is thrown away, so each try begins as the first.
    lab.script("fresh.sh", "test ! -e /mark\ntouch /mark\nfalse");
    lab.define("[[test]]\nscript = \"fresh.sh\"\nretries = 1\n");
    let baked = lab.bake();
    assert!(baked.log.contains("retrying in 2 s"), "{}", baked.log);
    assert!(
        baked.failure().1.contains("image.toml:3: the [[test]] fresh.sh failed: fresh.sh: exit status 1")
    );
}

#[test]
fn provisioners_run_in_the_order_of_the_file() {
    let lab = PackageLab::new();
    program(&lab, "ansible-playbook", "echo ansible >> /order");
    lab.script("a.sh", "echo a >> /order");
    lab.script("b.sh", "echo b >> /order");
    fs::write(lab.path("web/site.yml"), "- hosts: all\n").unwrap();
    lab.define(
        "[[run]]\nscript = \"a.sh\"\n[[ansible]]\nplaybook = \"site.yml\"\n[[run]]\nscript = \"b.sh\"\n",
    );
    lab.bake().facts();
    assert_eq!(lab.read("order"), "a\nansible\nb\n");
}

#[test]
fn templates_are_filled_in_and_files_stay_as_they_are() {
    let mut lab = PackageLab::new();
    lab.given.insert("port".into(), "8080".into());
    for name in ["site.conf", "plain.conf"] {
        fs::write(lab.path("web").join(name), "listen {{ port }};\n{% if tls %}\ntls on;\n{% endif %}\n")
            .unwrap();
    }
    let files = "[[file]]\nsource = \"site.conf\"\ntarget = \"/etc/site.conf\"\nmode = \"0640\"\ntemplate = true\n\
                 [[file]]\nsource = \"plain.conf\"\ntarget = \"/etc/plain.conf\"\n";
    lab.define(&format!("[vars]\nport = \"80\"\ntls = \"\"\n{files}"));
    lab.bake().facts();
    assert_eq!(lab.read("etc/site.conf"), "listen 8080;\n");
    assert!(lab.read("etc/plain.conf").starts_with("listen {{ port }};\n{% if"));
    assert_eq!(lab.image("etc/site.conf").metadata().unwrap().permissions().mode() & 0o7777, 0o640);
}

#[test]
fn a_secret_reaches_its_script_alone() {
    let lab = with_secret();
    // Neither by its arguments nor by another process of the step is it seen; the next script does not have it.
    lab.script(
        "with.sh",
        "test \"$TOKEN\" = \"hunter2-\\\"it's\\\"-9f8e7d\"\n! grep -qa 'hunter[2]' /proc/[0-9]*/cmdline\n\
         ! cat /proc/1/environ 2>/dev/null | grep -a 'hunter[2]'\n! grep -rqs --exclude-dir=definition 'hunter[2]' /run",
    );
    lab.script("without.sh", "test -z \"${TOKEN+x}\"");
    lab.define(
        "[[run]]\nscript = \"with.sh\"\nsecrets = [\"TOKEN\"]\n[[run]]\nscript = \"without.sh\"\n\
         [[test]]\nscript = \"with.sh\"\nsecrets = [\"TOKEN\"]\n[[test]]\nscript = \"without.sh\"\n",
    );
    lab.bake().facts();
}

#[test]
fn a_secret_is_in_no_line_whatever_prints_it() {
    let lab = with_secret();
    lab.script(
        "loud.sh",
        "set -x\necho \"$TOKEN\" \"x${TOKEN}y\"\nset +x\nprintf %s \"$TOKEN\" | base64\n\
         perl -e 'print \"x\" x 16380, $ENV{TOKEN}, \"\\n\"; $_ = $ENV{TOKEN}; s/([^\\w-])/sprintf(\"%%%02X\", ord $1)/ge; print \"$_\\n\"'\n\
         echo \"$TOKEN\" >&2\ntouch \"/tmp/$TOKEN\"\nls /tmp\nls \"/no/$TOKEN\"",
    );
    lab.define("[[run]]\nscript = \"loud.sh\"\nsecrets = [\"TOKEN\"]\nretries = 1\n");
    let baked = lab.bake();
    let (code, text) = baked.failure();
    assert_eq!(code, STEP);
    let base64 = "aHVudGVyMi0iaXQncyItOWY4ZTdk";
    for (whose, told) in [("the log", &baked.log), ("the failure", &text)] {
        for part in ["hunter2", "9f8e7d", base64] {
            assert!(!told.contains(part), "{part} is in {whose}:\n{told}");
        }
        assert!(told.contains("x***y") && told.contains("/no/***"), "{whose}:\n{told}");
    }
}

#[test]
fn a_secret_in_the_image_fails_the_bake() {
    for (script, path) in [
        ("echo \"token = $TOKEN\" > /etc/site.conf", "/etc/site.conf"),
        ("mkdir -p /opt/a\nprintf \"x:$TOKEN\" | base64 > /opt/a/auth", "/opt/a/auth"),
        ("ln -s \"/$TOKEN\" /etc/link", "/etc/link"),
        // An old time of change is no cover.
        ("echo \"$TOKEN\" > /etc/old\ntouch -d 2001-01-01 /etc/old", "/etc/old"),
    ] {
        let lab = with_secret();
        lab.script("leak.sh", script);
        lab.define(
            "[[run]]\nscript = \"leak.sh\"\nsecrets = [\"TOKEN\"]\n[clean]\nkeep = [\"/etc/*\", \"/opt\"]\n",
        );
        let baked = lab.bake();
        let (code, text) = baked.failure();
        assert_eq!(code, STEP, "{text}");
        assert!(text.contains(&format!("{path}: contains the secret TOKEN")), "{text}");
        assert!(!text.contains("hunter2") && !baked.log.contains("hunter2"), "{text}");
    }
    // What is removed again is not there, nor is what a test writes.
    let lab = with_secret();
    lab.script("clean.sh", "echo \"$TOKEN\" > /etc/site.conf\nrm /etc/site.conf\necho \"$TOKEN\" > /tmp/x");
    lab.script("test.sh", "echo \"$TOKEN\" > /etc/site.conf");
    lab.define(
        "[[run]]\nscript = \"clean.sh\"\nsecrets = [\"TOKEN\"]\n[[test]]\nscript = \"test.sh\"\nsecrets = [\"TOKEN\"]\n",
    );
    lab.bake().facts();
}

#[test]
fn bats_of_the_image_and_none() {
    let lab = PackageLab::new();
    fs::create_dir(lab.path("web/tests")).unwrap();
    fs::write(lab.path("web/tests/web.bats"), "@test \"x\" { true; }\n").unwrap();
    lab.define("[[test]]\nbats = \"tests/web.bats\"\nargs = [\"--filter\", \"a b\"]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("image.toml:4: `bats` of [[test]] needs bats"), "{text}");
    assert!(text.contains("`packages`"), "{text}");
    program(&lab, "bats", "printf '<%s>' \"$@\"\necho\ntouch /written\ntest -f \"$3\"");
    let baked = lab.bake();
    let call = "<--filter><a b></run/oven/definition/tests/web.bats>";
    assert!(baked.log.contains(call), "{}", baked.log);
    baked.facts();
    assert!(!lab.image("written").exists(), "a test changes nothing");
}

#[test]
fn the_real_bats_as_a_package() {
    let lab = PackageLab::new();
    fs::write(
        lab.path("web/web.bats"),
        "@test \"the variable is there\" { [ \"$port\" = 80 ]; }\n@test \"the definition is\" { [ -f image.toml ]; }\n",
    )
    .unwrap();
    lab.define("packages = [\"bats\"]\n[vars]\nport = \"80\"\n[[test]]\nbats = \"web.bats\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("ok 2 the definition is"), "{}", baked.log);
    baked.facts();
    lab.define("[vars]\nport = \"81\"\n[[test]]\nbats = \"web.bats\"\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("not ok 1 the variable is there"), "{text}");
}

/// How Ansible is called, by a stand-in that is the image's own.
#[test]
fn a_playbook_is_run_with_what_the_definition_says() {
    let lab = with_secret();
    fs::write(lab.path("web/site.yml"), "- hosts: all\n").unwrap();
    program(
        &lab,
        "ansible-playbook",
        "printf '<%s>' \"$@\"\necho\ncat /run/oven/ansible.json\necho\ntest -n \"$TOKEN\"\ntest \"$PWD\" = /run/oven/definition\n\
         echo \"home $ANSIBLE_HOME, a $A, $OVEN_PHASE\"\ntest -f site.yml",
    );
    lab.define(
        "[vars]\nport = \"80\"\nname = \"x\"\n[[ansible]]\nplaybook = \"site.yml\"\ntags = [\"a\", \"b\"]\nargs = [\"--diff\"]\n\
         secrets = [\"TOKEN\"]\nenv = { A = \"1\" }\nvars = { port = 81, list = [\"é\"] }\n",
    );
    let baked = lab.bake();
    for words in [
        "<--inventory><localhost,><--connection><local><--extra-vars><@/run/oven/ansible.json><--tags><a,b><--diff>\
         </run/oven/definition/site.yml>",
        r#"{"list":["é"],"name":"x","port":81}"#,
        "home /run/ansible, a 1, ansible",
    ] {
        assert!(baked.log.contains(words), "{words}: {}", baked.log);
    }
    assert!(!baked.log.contains("for this bake only"), "the image has it: {}", baked.log);
    baked.facts();
    lab.define("[[ansible]]\nplaybook = \"site.yml\"\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("image.toml:3: the [[ansible]] site.yml failed"), "{text}");
}

#[test]
fn a_plugin_that_does_not_bring_ansible_is_named() {
    let lab = PackageLab::new();
    fs::write(lab.path("web/site.yml"), "- hosts: all\n").unwrap();
    lab.define("[[ansible]]\nplaybook = \"site.yml\"\n");
    let (code, text) = lab.bake_with(|plan| plan.tools = None).failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("image.toml:4: `playbook` of [[ansible]] needs ansible-playbook"), "{text}");
    assert!(text.contains("Add Ansible to `packages`"), "{text}");
}
