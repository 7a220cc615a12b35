use super::*;
use crate::{Expect, Holds, Question, Wanted};

fn valid_step() -> Step {
    Step {
        phase: Phase::Install,
        why: "installing 1 package".into(),
        argv: vec!["pkg".into(), "add".into(), "tree".into()],
        env: [("LC_ALL".to_owned(), "C".to_owned())].into(),
        retries: 0,
        before_retry: Vec::new(),
        network: false,
        also_good: Vec::new(),
        once: false,
        timeout: 60,
    }
}

fn faults(change: impl FnOnce(&mut Plan)) -> String {
    let mut plan = Plan { steps: vec![valid_step()], ..Plan::default() };
    change(&mut plan);
    faults_of_plan(&plan, &Job::default()).join("\n")
}

fn step_faults(change: impl FnOnce(&mut Step)) -> String {
    faults(|plan| change(&mut plan.steps[0]))
}

#[test]
fn a_valid_plan_has_no_faults() {
    assert_eq!(faults(|_| ()), "");
    let fetch = |step: &mut Step| (step.phase, step.network) = (Phase::Fetch, true);
    assert_eq!(step_faults(fetch), "");
    let job = Job { network: true, ..Job::default() };
    let plan = Plan { steps: vec![Step { network: true, ..valid_step() }], ..Plan::default() };
    assert_eq!(faults_of_plan(&plan, &job), Vec::<String>::new());
}

#[test]
fn steps() {
    assert!(step_faults(|s| s.why = "a\nb".into()).contains("steps[0]: why has control characters"));
    assert!(step_faults(|s| s.why.clear()).contains("why is empty"));
    assert!(step_faults(|s| s.argv.clear()).contains("names no program"));
    assert!(step_faults(|s| s.argv[0] = "pkg add tree".into()).contains("no shell"));
    assert!(step_faults(|s| s.argv[0] = "../bin/pkg".into()).contains("not absolute"));
    assert!(step_faults(|s| s.argv[1] = "a\0b".into()).contains("zero byte"));
    assert!(step_faults(|s| _ = s.env.insert("A=B".into(), "x".into())).contains("variable name"));
    assert!(step_faults(|s| s.timeout = 0).contains("timeout"));
    assert!(step_faults(|s| s.timeout = 1_000_000).contains("timeout"));
    assert!(step_faults(|s| s.retries = 1000).contains("retries"));
    assert!(step_faults(|s| s.once = true).contains("for fetch steps, but this step has phase install"));
    assert!(step_faults(|s| s.also_good = vec![102, 0]).contains("leave out 0"));
    assert!(step_faults(|s| s.before_retry = vec!["true".into()]).contains("would never run"));
    assert!(step_faults(|s| s.network = true).contains("does not set `network`"));
    assert!(step_faults(|s| (s.phase, s.network) = (Phase::Clean, true)).contains("only fetch steps"));
    assert!(step_faults(|s| s.phase = Phase::Fetch).contains("must be true"));
    let back = faults(|plan| plan.steps.push(Step { phase: Phase::Prepare, ..valid_step() }));
    assert!(back.contains("steps[1]: prepare after install"), "{back}");
}

#[test]
fn caches_are_directories_of_downloads() {
    let cache = |path: &str| Cache {
        path: path.into(),
        holds: Holds::Indexes,
        sources: vec!["/etc/pkg/repositories".into()],
    };
    let of = |paths: &[&str]| faults(|plan| plan.caches = paths.iter().map(|path| cache(path)).collect());
    assert_eq!(of(&["/var/cache/pkg", "/var/lib/pkg/index"]), "");
    for (path, why) in [
        ("/etc/pkg", "is not below /var/cache, /var/lib"),
        ("/var/cache", "is not below"),
        ("/var/cacheable", "is not below"),
        ("/var/cache/../../etc", "is not normalized"),
        ("var/cache/pkg", "is not absolute"),
        ("/var/lib/dpkg", "is the package manager's database"),
    ] {
        assert!(of(&[path]).contains(why), "{path}: {}", of(&[path]));
    }
    assert!(of(&["/var/cache/pkg", "/var/cache/pkg/files"]).contains("one contains the other"));
    assert!(of(&["/var/cache/pkg", "/var/cache/pkg"]).contains("one contains the other"));
    assert_eq!(of(&["/var/cache/pkg", "/var/cache/pkg2"]), "");
    let shim = Shim { path: "/var/cache/pkg/x".into(), content: String::new(), mode: 0o644 };
    let covered = faults(|plan| {
        plan.caches = vec![cache("/var/cache/pkg")];
        plan.shims.push(shim);
    });
    assert!(covered.contains("/var/cache/pkg and /var/cache/pkg/x: one contains"), "{covered}");
    let sources = |sources: &[&str]| {
        let sources = sources.iter().map(|s| (*s).to_owned()).collect();
        faults(|plan| plan.caches = vec![Cache { sources, ..cache("/var/cache/pkg") }])
    };
    assert_eq!(sources(&[]), "", "it is not cached");
    assert!(sources(&["etc/pkg"]).contains("is not absolute"));
    assert!(of(&["/var/cache/a"; 17]).contains("17 entries; at most 16 are allowed"));
}

#[test]
fn paths_stay_inside() {
    let shim = |path: &str, mode: u32| {
        let shim = Shim { path: path.into(), content: String::new(), mode };
        faults(|plan| plan.shims.push(shim))
    };
    assert_eq!(shim("/etc/pkg.conf", 0o644), "");
    assert_eq!(shim("/run/oven/pkg.conf", 0o644), "");
    for path in ["etc/x", "/etc/../x", "/etc//x", "/etc/", "/", "", "/a\nb", "/etc/./x"] {
        assert!(shim(path, 0o644).contains("shims: "), "{path}");
    }
    for path in ["/proc/sys/x", "/dev/null", "/sys/x", "/run/oven/packages/x", "/run/oven/ca.pem"] {
        assert!(shim(path, 0o644).contains(path), "{path}");
    }
    assert!(shim("/etc/x", 0o4755).contains("0o4755"));
    let claims = Claims { look_for: vec!["bin/pkg".into()], read: vec!["/../x".into()], ..Claims::default() };
    assert_eq!(faults_of_claims(&claims).len(), 2);
}

#[test]
fn lines_of_progress() {
    let line = |output: &str, done: Option<&str>| {
        let (output, done) = (output.to_owned(), done.map(str::to_owned));
        faults(|plan| plan.progress = vec![ProgressLine { output, done, ..ProgressLine::default() }])
    };
    assert_eq!(line("(*/*)", Some("{1}")), "");
    assert!(line("(*/*)", Some("{3}")).contains("progress[0]: {3} has no `*`"));
    assert!(line(" * ", Some("1")).contains("matches every line"));
    assert!(line("got *", None).contains("it says nothing"));
    let good = ProgressLine { output: "got *".into(), done: Some("+1".into()), ..ProgressLine::default() };
    let many = vec![good; MAX_PROGRESS + 1];
    assert!(faults(|plan| plan.progress = many).contains("101 entries; at most 100 are allowed"));
}

#[test]
fn files_facts_and_troubles() {
    let file = Shim { path: "/run/x".into(), content: String::new(), mode: 0o644 };
    assert!(faults(|plan| plan.files = vec![file.clone()]).contains("is not below /etc"));
    let file = Shim { path: "/etc/x".into(), ..file };
    assert!(faults(|plan| plan.files = vec![file.clone(), file.clone()]).contains("twice"));
    assert_eq!(faults(|plan| plan.files = vec![file.clone()]), "");
    let one = |change: fn(&mut Shim)| {
        let mut file = file.clone();
        change(&mut file);
        faults(|plan| plan.files = vec![file])
    };
    assert!(one(|file| file.path = "/usr/lib".into()).contains("is not below /etc"));
    assert!(one(|file| file.mode = 0o666).contains("at most 0o755 is allowed"));
    assert!(one(|file| file.content = "x".repeat(MAX_CONTENT + 1)).contains("4 MiB"));
    for name in ["", "../x", "a b", ".x", "inputs.json"] {
        assert!(faults(|plan| _ = plan.facts.insert(name.into(), vec!["true".into()])).contains("facts"));
    }
    let versions = |argv: &[&str]| {
        faults(|plan| plan.versions = argv.iter().map(|argument| (*argument).to_owned()).collect())
    };
    assert_eq!(versions(&["apt-cache", "madison", "{name}"]), "");
    assert!(versions(&["apt-cache", "madison"]).contains("versions: no argument has {name}"));
    assert!(versions(&["", "{name}"]).contains("versions: it names no program"));
    let wanted = Wanted { name: "tree".into(), architecture: None, version: None };
    let expect = Expect { packages: vec![wanted], ..Expect::default() };
    assert!(faults(|plan| plan.expect = expect).contains("the fact `packages`, which is missing"));
    let trouble = |output: &str, means: &str| {
        let (output, means) = (output.to_owned(), means.to_owned());
        faults(|plan| plan.troubles = vec![Trouble { output, means, hint: None, package: None }])
    };
    assert_eq!(trouble("E: no *", "no {1}"), "");
    assert!(trouble("E: no *", "no {2}").contains("{2} has no `*`"));
    assert!(trouble("*", "no").contains("matches every line"));
    assert!(trouble("E", "").contains("means is empty"));
    let note = Trouble { output: "N: *".into(), means: "{2}".into(), hint: None, package: None };
    assert!(faults(|plan| plan.notes = vec![note]).contains("notes[0]: {2} has no `*`"));
}

#[test]
fn tools_for_a_bake_alone() {
    let job = Job { tools: vec!["ansible-playbook".into()], ..Job::default() };
    let good = || Tools {
        steps: vec![valid_step()],
        unneeded: Question { argv: vec!["pkg".into()], env: BTreeMap::new(), output: "*".into() },
        remove: vec![Step { argv: ["pkg", "delete", "{name}"].map(str::to_owned).into(), ..valid_step() }],
    };
    let of = |job: &Job, change: &dyn Fn(&mut Tools)| {
        let mut tools = good();
        change(&mut tools);
        let facts = [("packages".to_owned(), vec!["pkg".to_owned(), "list".to_owned()])].into();
        faults_of_plan(&Plan { facts, tools: Some(tools), ..Plan::default() }, job).join("\n")
    };
    assert_eq!(of(&job, &|_| ()), "");
    assert!(of(&Job::default(), &|_| ()).contains("the job does not need any tools"));
    assert!(of(&job, &|tools| tools.steps.clear()).contains("tools.steps: it is empty"));
    assert!(of(&job, &|tools| tools.remove.clear()).contains("tools.remove: it is empty"));
    assert!(of(&job, &|tools| tools.steps[0].why.clear()).contains("tools.steps[0]: why is empty"));
    assert!(of(&job, &|tools| tools.steps[0].phase = Phase::Verify).contains("neither fetch nor install"));
    assert!(
        of(&job, &|tools| tools.remove[0].argv = vec!["pkg".into()])
            .contains("no argument contains `{name}`")
    );
    assert!(of(&job, &|tools| tools.unneeded.argv.clear()).contains("tools.unneeded: it names no program"));
    assert!(of(&job, &|tools| tools.unneeded.output = "none".into()).contains("needs a `*`"));
    let variable = |tools: &mut Tools| _ = tools.unneeded.env.insert("1".into(), String::new());
    assert!(of(&job, &variable).contains("tools.unneeded: env"));
    let networked = Job { network: true, ..job.clone() };
    assert!(of(&networked, &|tools| tools.remove[0].network = true).contains("needs no network"));
    let plan = Plan { tools: Some(good()), ..Plan::default() };
    assert!(faults_of_plan(&plan, &job).join("\n").contains("tools: the fact `packages` is missing"));
}
