//! Runs the conformance suite, which every plugin has to pass.

#[test]
fn it_conforms() {
    let findings = oven_distro::check(&oven_suse::Suse, &[]);
    assert!(findings.is_fine() && !findings.incomplete, "{findings}");
}
