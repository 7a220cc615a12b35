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
