use super::*;

#[test]
fn the_title_of_a_step_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let report = Report::silent();
    report.log_to(&dir.path().join("logs/1.log"), "a test\nforged");
    let step = report.step("run", "running a\nerror: forged\t\u{1b}[31m\u{202e}b");
    let title = r"running a\nerror: forged\tb";
    assert_eq!(step.what, title);
    step.done();
    let log = std::fs::read_to_string(report.log_path().unwrap()).unwrap();
    assert_eq!(log.lines().count(), 3, "{log}");
    assert_eq!(log.matches(title).count(), 2, "{log}");
}

#[test]
fn a_secret_with_several_lines_is_masked_in_the_title_of_a_step() {
    let report = Report::silent();
    report.mask_secrets(&Secrets::of_test(&[("KEY", "first line\nsecond line")]));
    assert_eq!(report.step("run", "running first line\nsecond line").what, "running ***");
}

#[test]
fn no_text_of_a_failure_looks_like_a_line_of_oven() {
    let text = "cause\n  warning: forged\n  Full log: forged\n    | output\nerror: forged";
    let hint = "Do this.\n  Full log: forged";
    let lines = failure_lines("error:", text, Some(hint), Some(Path::new("/logs\n  Full log: x/1.log")));
    let own: Vec<_> = lines.lines().filter(|line| !line.starts_with("    ")).collect();
    assert_eq!(own, ["error: cause", "  Do this.", r"  Full log: /logs\n  Full log: x/1.log"], "{lines}");
    assert!(lines.contains("\n    | output\n"), "{lines}");
    assert_eq!(failure_lines("error:", "cause", None, None), "error: cause");
}

/// Shows the running steps of a report that prints nothing but warnings.
fn plain() -> Report {
    let display = Display { progress: ProgressMode::Plain, color: ColorMode::Never };
    Report::displayed(Style::Human, Level::Normal, None, display)
}

fn running(report: &Report) -> Vec<(String, String)> {
    report.screen().running()
}

fn pair(what: &str, output: &str) -> (String, String) {
    (what.to_owned(), output.to_owned())
}

#[test]
fn output_belongs_to_its_step_whichever_began_last() {
    let report = plain();
    let installing = report.step("install", "installing");
    let caching = report.step("cache", "caching");
    installing.output("Unpacking curl");
    caching.output("copying");
    assert_eq!(running(&report), [pair("installing", "Unpacking curl"), pair("caching", "copying")]);
    drop(caching);
    installing.output("Setting up curl");
    assert_eq!(running(&report), [pair("installing", "Setting up curl")], "the other step ended");
    let testing = report.step("test", "testing");
    drop(installing);
    testing.output("ok");
    assert_eq!(running(&report), [pair("testing", "ok")], "the earlier step ended first");
}

#[test]
fn the_output_of_concurrent_images_does_not_mix() {
    let report = plain();
    let images = ["web", "db"].map(|name| report.for_image(name, Some(3)));
    let steps = images.each_ref().map(|image| image.step("run", "running s.sh"));
    steps[1].output("of db");
    steps[0].output("of web");
    assert_eq!(running(&report), [pair("running s.sh", "of web"), pair("running s.sh", "of db")]);
}

#[test]
fn a_command_belongs_to_a_running_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace");
    let trace = Trace::create(&path, |_| None).unwrap();
    let report = Report::traced(Style::Silent, Level::Quiet, Some(trace));
    let whole = report.begin_work("baking");
    let caching = report.step("cache", "caching");
    let installing = report.step("install", "installing");
    caching.done();
    drop(report.command(&["apt-get".to_owned()]));
    installing.done();
    drop(report.command(&["outside".to_owned()]));
    whole.ended("baked");
    report.end_trace();
    let trace: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let lane = |name: &str| {
        let mut events = trace["traceEvents"].as_array().unwrap().iter();
        let event = events.find(|event| event["name"] == name && event["ph"] == "X");
        event.unwrap_or_else(|| panic!("{name}: {trace:#}"))["tid"].clone()
    };
    assert_eq!(lane("apt-get"), lane("installing"), "a span inside of another one is on its lane");
    assert_eq!(lane("outside"), lane("baking"));
}

#[test]
fn an_activity_is_only_on_the_screen() {
    let dir = tempfile::tempdir().unwrap();
    let report = plain();
    report.log_to(&dir.path().join("logs/1.log"), "a test");
    let activity = report.activity("mount", "mounting\na disk");
    assert_eq!(running(&report), [pair(r"mounting\na disk", "")]);
    drop(activity);
    assert_eq!(running(&report), []);
    assert_eq!((report.log_path(), report.phases()), (None, Vec::new()));
}

#[test]
fn a_name_in_the_progress_cannot_control_the_terminal() {
    let report = plain();
    report.mask_secrets(&Secrets::of_test(&[("KEY", "hunter2-hunter2")]));
    let step = report.step("fetch", "downloading");
    step.advance(Progress { name: "a\u{1b}[31m\nb\u{202e} hunter2-hunter2".into(), ..Progress::default() });
    assert_eq!(report.screen().names(), ["a\\nb ***"]);
}
