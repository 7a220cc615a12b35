//! `[clean]`, and the places of what plugins refuse.

use super::*;
use crate::error::mistakes_of;

const FROM: &str = "from = \"ami-0123456789abcdef0\"\n";

#[test]
fn an_image_keeps_what_it_needs_to_boot() {
    let top = tree();
    let removes = |path: &str| load(top.path(), &format!("{FROM}[clean]\nremove = [{path:?}]\n"));
    for path in [
        "/*",
        "/**",
        "/u*",
        "/*/bin",
        "/usr",
        "/usr/",
        "/usr/*",
        "/boot/*",
        "/etc/**",
        "/boot",
        "/etc/*",
        "/var/*/*",
        "/usr/l*",
        "/usr/bin/*",
        "/var/lib/dpkg",
        "/lib64",
        "/proc",
    ] {
        let error = removes(path).unwrap_err();
        let shown = path.trim_end_matches('/');
        let start = format!("DIR/web/image.toml:3: `remove` of [clean] has {shown:?}");
        assert!(error.starts_with(&start) && error.contains("the image does not boot"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for path in [
        "/usr/share/doc",
        "/usr/share/doc/*",
        "/etc/*.key",
        "/etc/app",
        "/boot/old-*",
        "/run/*",
        "/srv",
        "/var/lib/app/*",
        "/usrlocal",
        "/home/*",
    ] {
        assert_eq!(removes(path).unwrap().remove, [path]);
    }
}

#[test]
fn the_paths_of_clean_do_not_contradict_the_definition() {
    let top = tree();
    let file = "[[file]]\nsource = \"setup.sh\"\ntarget = \"/etc/app/conf.d/x\"\n";
    let cases = [
        (
            "remove = [\"/a\", \"/b/\",\n\"/b\"]",
            "4: `remove` of [clean] has /b twice (first on line 3): remove one",
        ),
        ("keep = [\"/a\", \"/a\"]", "3: `keep` of [clean] has /a twice (first on line 3): remove one"),
        (
            "keep = [\"/a\"]\nremove = [\"/a\"]",
            "4: `remove` of [clean] has /a, which is also in `keep` on line 3: remove one",
        ),
    ];
    for (clean, expected) in cases {
        let error = load(top.path(), &format!("{FROM}[clean]\n{clean}\n")).unwrap_err();
        assert_eq!(error, format!("DIR/web/image.toml:{expected}"));
    }
    for path in ["/etc/app/conf.d/x", "/etc/app", "/etc/app/*", "/etc/a*/conf.d", "/etc/app/conf.d/*"] {
        let error = load(top.path(), &format!("{FROM}[clean]\nremove = [{path:?}]\n{file}")).unwrap_err();
        let expected =
            "3: `remove` of [clean] removes /etc/app/conf.d/x, which a [[file]] places: remove one of them";
        assert_eq!(error, format!("DIR/web/image.toml:{expected}"), "{path}");
    }
    for path in ["/etc/app/conf.d/y", "/etc/app/*/y", "/etc/app/conf.d/x/y", "/etc/ap"] {
        load(top.path(), &format!("{FROM}[clean]\nremove = [{path:?}]\n{file}")).unwrap();
    }
    // Some of what is removed may stay.
    load(top.path(), &format!("{FROM}[clean]\nremove = [\"/etc/app\"]\nkeep = [\"/etc/app/x\"]\n")).unwrap();
    // A mistake of the table is reported once.
    let error = load(top.path(), &format!("{FROM}clean = 1\n")).unwrap_err();
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn a_refusal_of_a_plugin_has_its_place() {
    let top = tree();
    let repository = "url = \"https://x.example/\"\nsigned = false\n";
    let toml = format!(
        "{FROM}hold = [\n\"jq\",\n\"git\",\n]\ndebconf = [\"a a/b string x\"]\npackages = [\n\"curl/stable=1.*\",\n\
         \"./site.deb\",\n\"@tools\"]\n[[repository]]\nname = \"a\"\n{repository}[[repository]]\nname = \"b\"\n\
         {repository}priority = 7\n"
    );
    let image = load(top.path(), &toml).unwrap();
    for (refusal, expected) in [
        ("[[repository]] `b`: `priority` cannot be set", Some((19, "repository.priority"))),
        ("[[repository]] `b`: `deb` is not `signed`", Some((16, "repository.name"))),
        ("[[repository]] `a`: choose another name", Some((12, "repository.name"))),
        ("[[repository]] `c`: choose another name", None),
        ("packages: `curl/stable`: only apt has suites", Some((8, "packages"))),
        ("packages: `curl`: no", Some((8, "packages"))),
        ("packages: `curl/stable=1.*`: no", Some((8, "packages"))),
        ("packages: `site.deb` is for arm64", Some((9, "packages"))),
        ("packages: `@tools`: no", Some((10, "packages"))),
        ("packages: microdnf has no groups, `x` is", Some((7, "packages"))),
        ("packages cannot be installed: the image has no apt", None),
        ("hold: `git` is not a valid package name", Some((4, "hold"))),
        ("debconf: it works only with Debian packages", Some((6, "debconf"))),
        ("mirror: no", None),
        ("no", None),
        ("", None),
    ] {
        let place = image.place_of_refusal(refusal);
        let found = place.as_ref().map(|place| (place.line.unwrap(), place.key.as_deref().unwrap()));
        assert_eq!(found, expected, "{refusal}");
        if let Some((place, (line, _))) = place.zip(expected) {
            let shown = place.to_string().replace(top.path().to_str().unwrap(), "DIR");
            assert_eq!(shown, format!("DIR/web/image.toml:{line}"));
        }
    }
}

#[test]
fn long_advice_is_given_once() {
    let top = tree();
    let many: String = (0..30).rev().map(|i| format!("zz{i:02} = 1\n")).collect();
    rewrite(top.path(), format!("{FROM}{many}[disk]\nzz = 1\nyy = 1\n").as_bytes());
    let error = Definition::load(&top.path().join("web")).unwrap_err();
    let text = error.to_string();
    assert_eq!(text.matches("the valid keys are").count(), 1, "{text}");
    let first = text.lines().next().unwrap();
    assert!(first.contains(":2: unknown key `zz29`: the valid keys are "), "{text}");
    assert!(text.lines().nth(1).unwrap().ends_with(":3: unknown key `zz28`"), "{text}");
    assert!(text.ends_with("\nand 12 more"), "{text}");
    assert_eq!(mistakes_of(&error).len(), 20);
    // Each table has its own keys.
    let error = load(top.path(), &format!("{FROM}zz = 1\n[disk]\nzz = 1\nyy = 1\n")).unwrap_err();
    let counts: Vec<_> = error.lines().map(|line| line.matches("the valid keys are").count()).collect();
    assert_eq!(counts, [1, 1, 0], "{error}");
}

#[test]
fn a_mistake_of_syntax_has_its_key() {
    let top = tree();
    for (toml, key) in [
        ("name = web", Some("name")),
        ("[disk]\n# x\nsize_gib = a", Some("disk.size_gib")),
        ("[[run]]\ntimeout = a", Some("run.timeout")),
        ("[disk", Some("disk")),
        ("[C2VjcmV0]\nname = a", None),
        ("c2VjcmV0 = c2VjcmV0", None),
        ("'c2VjcmV0", None),
    ] {
        rewrite(top.path(), format!("{FROM}{toml}\n").as_bytes());
        let error = Definition::load(&top.path().join("web")).unwrap_err();
        let place = mistakes_of(&error).remove(0).place.unwrap();
        assert_eq!(place.key.as_deref(), key, "{toml}: {error}");
    }
}
