//! The suite that every plugin has to pass, ours like others'.

#[test]
fn it_conforms() {
    let findings = oven_distro::check(&oven_suse::Suse, &[]);
    assert!(findings.is_fine() && !findings.incomplete, "{findings}");
}
