//! What a plan may have besides steps: files that stay, lines that are failures, what is done before a step
//! is retried. The steps are the tests' own, added to the Debian plugin's plan of nothing.

use super::{MACHINE, STEP, lab};
use oven_distro::{Phase, ProgressLine, Shim, Step, Trouble};
use std::fs;

fn step(argv: &[&str]) -> Step {
    Step {
        phase: Phase::Install,
        why: "doing it".into(),
        argv: argv.iter().map(|a| (*a).to_owned()).collect(),
        env: Default::default(),
        retries: 0,
        before_retry: Vec::new(),
        also_good: Vec::new(),
        once: false,
        network: false,
        timeout: 60,
    }
}

#[test]
fn a_line_of_a_step_that_ended_well_may_be_a_failure() {
    let lab = lab();
    lab.define("");
    let failure = Trouble {
        output: "warning: %post(*) scriptlet failed*".into(),
        means: "a script of `{1}` failed".into(),
        hint: Some("See {1}.".into()),
        package: None,
    };
    let planned = |line: &str| {
        let argv = ["echo", line];
        lab.bake_with(|plan| {
            plan.steps.insert(0, step(&argv));
            plan.failures.push(failure.clone());
        })
    };
    planned("warning: %post of something else").facts();
    let (code, text) = planned("warning: %post(thing-1.0) scriptlet failed, exit status 1").failure();
    assert_eq!(code, STEP);
    assert!(
        text.contains("doing it failed: a script of `thing-1.0` failed") && text.ends_with("See thing-1.0."),
        "{text}"
    );
}

#[test]
fn exit_codes_may_mean_success_and_lines_may_be_notes() {
    let lab = lab();
    lab.define("");
    let planned = |code: &'static str| {
        lab.bake_with(move |plan| {
            let script = format!("echo x created as x.new; exit {code}");
            plan.steps.insert(0, Step { also_good: vec![102], ..step(&["sh", "-c", &script]) });
            let note = Trouble {
                output: "* created as *".into(),
                means: "{1} stays".into(),
                hint: Some("See {2}.".into()),
                package: None,
            };
            plan.notes.push(note);
        })
    };
    let baked = planned("102");
    assert!(baked.log.contains("note    x stays (See x.new)"), "{}", baked.log);
    baked.facts();
    assert_eq!(planned("103").failure().0, STEP);
}

#[test]
fn a_failed_query_is_explained_by_its_last_lines() {
    let lab = lab();
    lab.define("");
    for output in ["", " >&2"] {
        let script = format!("{{ seq 5000; echo 'Error: no `x`'; }}{output}; exit 1");
        let baked = lab.bake_with(|plan| {
            plan.facts.insert("odd".into(), ["sh", "-c", &script].map(str::to_owned).to_vec());
            plan.troubles.insert(
                0,
                Trouble {
                    output: "Error: no *".into(),
                    means: "{1} is missing".into(),
                    hint: None,
                    package: None,
                },
            );
        });
        let (code, text) = baked.failure();
        assert!(code == STEP && text.contains("`x` is missing"), "{text}");
    }
}

#[test]
fn each_step_has_a_status_descriptor_if_the_plan_has_progress() {
    let lab = lab();
    lab.define("");
    let install = step(&["sh", "-c", "echo done:1 >&3"]);
    let line = |phase| ProgressLine {
        output: "done:*".into(),
        phases: vec![phase],
        done: Some("{1}".into()),
        ..ProgressLine::default()
    };
    lab.bake_with(|plan| {
        plan.progress = vec![line(Phase::Fetch)];
        plan.steps.insert(0, install.clone());
    })
    .facts();
    let (code, text) = lab
        .bake_with(|plan| {
            plan.progress.clear();
            plan.steps.insert(0, install.clone());
        })
        .failure();
    assert!(code == STEP && text.contains("Bad file descriptor"), "{text}");
}

#[test]
fn what_a_step_wants_done_before_it_is_tried_again() {
    let lab = lab();
    lab.define("");
    let clearing = |program: &'static str| {
        lab.bake_with(move |plan| {
            let before_retry = vec![program.to_owned(), "/cleared".to_owned()];
            plan.steps.insert(0, Step { retries: 1, before_retry, ..step(&["test", "-e", "/cleared"]) });
        })
    };
    let baked = clearing("false");
    assert!(baked.log.contains("cleaning up before a retry: false failed"), "{}", baked.log);
    assert_eq!(baked.failure().0, STEP);
    clearing("touch").facts();
}

#[test]
fn files_of_a_plan_stay_and_lie_where_configuration_does() {
    let lab = lab();
    lab.define("");
    let file = |path: &str| Shim { path: path.into(), content: "planned\n".into(), mode: 0o644 };
    let planned = |path: &'static str| lab.bake_with(move |plan| plan.files.push(file(path)));
    planned("/etc/new/of-the-plan.conf").facts();
    assert_eq!(lab.read("etc/new/of-the-plan.conf"), "planned\n");
    // Whatever the image makes of the path, it is inside.
    let host = lab.path("host");
    std::os::unix::fs::symlink(&host, lab.image("etc/out")).unwrap();
    _ = planned("/etc/out/canary");
    assert_eq!(fs::read_to_string(host.join("canary")).unwrap(), "host");
    let baked = planned("/etc/hostname");
    assert!(baked.log.contains("/etc/hostname of the base image is replaced"), "{}", baked.log);
    for path in ["/root/.ssh/authorized_keys", "/etc/../root/x", "/usr/bin/x"] {
        let (code, text) = planned(path).failure();
        assert_eq!(code, MACHINE);
        assert!(text.contains(path) && text.contains("bug in the distribution's plugin"), "{text}");
    }
}
