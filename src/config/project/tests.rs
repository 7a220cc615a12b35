use super::*;

fn tree() -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(top.path().join("project/images/web")).unwrap();
    std::fs::write(top.path().join("project/ca.pem"), "").unwrap();
    top
}

/// The settings of `project/images/web` if `project/oven.toml` has this text.
fn settings(top: &Path, toml: &str) -> Result<Settings, String> {
    std::fs::write(top.join("project/oven.toml"), toml).unwrap();
    Settings::for_definition(&top.join("project/images/web")).map_err(|e| {
        assert_eq!(Kind::of(&e), Kind::Definition, "{e:#}");
        let real = std::fs::canonicalize(top).unwrap();
        format!("{e:#}").replace(real.to_str().unwrap(), "DIR")
    })
}

#[test]
fn a_whole_file_is_read_and_paths_are_relative_to_it() {
    let top = tree();
    let project = std::fs::canonicalize(top.path().join("project")).unwrap();
    let toml = "cloud = \"local\"\nregion = \"test-1\"\nregion_dir = \"../region\"\n\
                instance_id = \"i-0123456789abcdef0\"\nzone = \"eu-central-1a\"\n\
                disks = \"direct\"\ncache_gib = 3\n[network]\n\
                proxy = \"http://user:secret@proxy.example:3128/\"\nno_proxy = \"localhost, .example\"\n\
                ca_file = \"ca.pem\"\nmirror = \"https://deb.example/debian/\"\n\
                [limits]\nmemory_gib = 6\npids = 900\n";
    let settings = settings(top.path(), toml).unwrap();
    assert_eq!(settings.file, Some(project.join("oven.toml")));
    assert_eq!((&*settings.cloud, settings.region.as_deref()), ("local", Some("test-1")));
    assert_eq!(settings.region_dir, Some(project.join("../region")));
    let builder = (settings.instance_id.as_deref(), settings.zone.as_deref());
    assert_eq!(builder, (Some("i-0123456789abcdef0"), Some("eu-central-1a")));
    assert_eq!((settings.disks(), settings.cache_gib), (Strategy::Direct, 3));
    let expected = NetworkSettings {
        proxy: Some("http://user:secret@proxy.example:3128".into()),
        no_proxy: Some("localhost,.example".into()),
        ca_file: Some(project.join("ca.pem")),
        mirror: Some("https://deb.example/debian".into()),
    };
    assert_eq!(settings.network, expected);
    assert_eq!(settings.limits, StepLimits { memory_gib: Some(6), pids: 900 });
}

#[test]
fn the_nearest_file_counts_and_none_is_needed() {
    let top = tree();
    let web = top.path().join("project/images/web");
    assert_eq!(Settings::for_definition(&web).unwrap(), Settings::default());
    assert_eq!(Settings::default().disks(), Strategy::Attached);
    assert_eq!(
        settings(top.path(), "[limits]\n").unwrap().limits,
        StepLimits { memory_gib: None, pids: 4096 }
    );
    std::fs::remove_file(top.path().join("project/oven.toml")).unwrap();
    std::fs::write(top.path().join("project/oven.toml"), "region = \"far\"").unwrap();
    assert_eq!(Settings::for_definition(&web).unwrap().region.as_deref(), Some("far"));
    std::fs::write(web.join("oven.toml"), "region = \"near\"").unwrap();
    assert_eq!(Settings::for_definition(&web).unwrap().region.as_deref(), Some("near"));
    assert_eq!(Settings::for_definition(&web.join("..")).unwrap().region.as_deref(), Some("far"));
}

#[test]
fn each_mistake_names_line_and_key() {
    let top = tree();
    let cases = [
        ("cluod = \"local\"", "1: unknown key `cluod`: did you mean `cloud`?"),
        (
            "cloud = \"azure\"",
            if cfg!(feature = "aws") {
                "1: `cloud` is \"azure\": it must be `aws` or `local`"
            } else {
                "1: `cloud` is \"azure\": it must be `local`"
            },
        ),
        (
            "instance_id = \"web\"",
            "1: `instance_id` is \"web\": an instance's id is `i-`, followed by 17 (or 8) digits",
        ),
        ("instance_id = 1", "1: `instance_id` is an integer: it should be an instance's id"),
        ("zone = \"eu-central-1\"", "such as \"eu-central-1a\" (a region, and the zone's letter)"),
        (
            "zone = \"EU\"",
            "1: `zone` is \"EU\": it should be an availability zone, such as \"eu-central-1a\"",
        ),
        ("disks = \"direkt\"", "1: `disks` is \"direkt\": it must be `attached` or `direct`"),
        ("disks = \"nbd\"", "is \"nbd\": it must be `attached` or `direct`"),
        ("disks = true", "1: `disks` is a boolean: it should be \"attached\" or \"direct\""),
        ("cache_gib = 0", "1: `cache_gib` is 0: it should be 1 to 65536 GiB"),
        ("cache_gib = \"3\"", "1: `cache_gib` is a string"),
        ("cloud = 1", "1: `cloud` is an integer: it should be \"local\" or \"aws\""),
        ("region = \"eu central\"", "1: `region` is \"eu central\""),
        ("region_dir = \"\"", "1: `region_dir` is \"\": it should be a path"),
        ("[network]\nproxi = 1", "2: unknown key `proxi` of [network]: did you mean `proxy`?"),
        (
            "[network]\nregion = \"a\"",
            "2: unknown key `region` of [network]: it belongs above the first header",
        ),
        (
            "[network]\nproxy = \"proxy:3128\"",
            "2: `proxy` of [network] is \"proxy:3128\", which does not begin with `http://`",
        ),
        (
            "[network]\nproxy = \"ftp://a\"",
            "2: `proxy` of [network] is \"ftp://a\", which does not begin with `http://` or `https://` or \
             `socks5h://`: it should be",
        ),
        (
            "[network]\nproxy = \"http://u:secret@\"",
            "2: `proxy` of [network] is \"http://…@\", which has no host",
        ),
        ("[network]\nproxy = \"http://a\\\";b\"", "which contains the invalid character '\"'"),
        (
            "[network]\nmirror = \"https://me:secret@deb.example/\"",
            "2: `mirror` of [network] contains a user name or a password, which would appear in logs",
        ),
        (
            "[network]\nmirror = \"file:///x\"",
            "2: `mirror` of [network] is \"file:///x\", which does not begin with",
        ),
        ("[network]\nno_proxy = \"a;b\"", "2: `no_proxy` of [network] has \"a;b\""),
        (
            "[network]\nca_file = \"gone.pem\"",
            "2: `ca_file` of [network] names \"gone.pem\", but DIR/project/gone.pem",
        ),
        (
            "[network]\nca_file = \"images\"",
            "2: `ca_file` of [network] is a directory: it must be a file with certificates",
        ),
        ("[limits]\nmemory_gib = 0", "2: `memory_gib` of [limits] is 0: it should be 1 to 65536 GiB"),
        ("[limits]\npids = 511", "2: `pids` of [limits] is 511: it should be 512 to 4194304 processes"),
        ("[limits]\nmemory = 3", "2: unknown key `memory` of [limits]: did you mean `memory_gib`?"),
        ("[network", "1: "),
    ];
    for (toml, expected) in cases {
        let error = settings(top.path(), toml).unwrap_err();
        assert!(
            error.starts_with("DIR/project/oven.toml:") && error.contains(expected),
            "{toml}\ngives {error}"
        );
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn a_ca_file_outside_the_checkout_is_checked_only_by_a_bake() {
    let top = tree();
    let outside = std::fs::canonicalize(top.path()).unwrap();
    std::fs::write(outside.join("ca.pem"), "").unwrap();
    std::fs::create_dir(top.path().join("directory")).unwrap();
    std::os::unix::fs::symlink("../ca.pem", top.path().join("project/link")).unwrap();
    let read = |path: &str| {
        let settings = settings(top.path(), &format!("[network]\nca_file = {path:?}\n")).unwrap();
        assert!(settings.network.ca_file.is_some(), "{path}");
        settings.network.check().map_err(|e| {
            assert_eq!(Kind::of(&e), Kind::Definition);
            e.to_string().replace(outside.to_str().unwrap(), "DIR")
        })
    };
    for path in ["../ca.pem", "link", outside.join("ca.pem").to_str().unwrap()] {
        assert_eq!(read(path), Ok(()));
    }
    let error = read(outside.join("gone.pem").to_str().unwrap()).unwrap_err();
    let expected = "oven.toml: `ca_file` of [network] names DIR/gone.pem, which cannot be read: No such file";
    assert!(error.starts_with(expected), "{error}");
    let error = read(outside.join("directory").to_str().unwrap()).unwrap_err();
    assert!(
        error.ends_with("DIR/directory, which is a directory: it must be a file with certificates"),
        "{error}"
    );
}

#[test]
fn ec2_is_known_where_it_was_built_in() {
    let top = tree();
    let read = settings(top.path(), "cloud = \"aws\"\nzone = \"us-west-2-lax-1a\"");
    if cfg!(feature = "aws") {
        assert_eq!(read.unwrap().cloud, AWS);
    } else {
        let error = read.unwrap_err();
        let expected = "oven.toml:1: `cloud` is \"aws\", but this oven was built without EC2";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn overrides_win_and_empty_ones_are_mistakes() {
    let file =
        Settings { region: Some("file".into()), region_dir: Some("/file".into()), ..Settings::default() };
    assert_eq!(file.clone().merge(&Overrides::default()).unwrap(), file);
    let (none, empty) = (Overrides::default(), Some(String::new()));
    let all = [
        ("--cloud", Overrides { cloud: empty.clone(), ..none.clone() }),
        ("--region", Overrides { region: empty.clone(), ..none.clone() }),
        ("--region-dir", Overrides { region_dir: Some(PathBuf::new()), ..none.clone() }),
        ("--instance-id", Overrides { instance_id: empty.clone(), ..none.clone() }),
        ("--zone", Overrides { zone: empty.clone(), ..none.clone() }),
        ("--disks", Overrides { disks: empty, ..none }),
    ];
    for (flag, empty) in all {
        let error = file.clone().merge(&empty).unwrap_err();
        assert!(Kind::of(&error) == Kind::Usage && error.to_string().contains(flag), "{error}");
    }
    let flags = Overrides {
        region: Some("flag".into()),
        region_dir: Some("flag".into()),
        instance_id: Some("i-01234567".into()),
        zone: Some("eu-west-1c".into()),
        disks: Some("direct".into()),
        ..Overrides::default()
    };
    let merged = file.clone().merge(&flags).unwrap();
    assert_eq!((merged.region.as_deref(), merged.region_dir), (Some("flag"), Some("flag".into())));
    assert_eq!(merged.instance_id.as_deref(), Some("i-01234567"));
    assert_eq!(merged.zone.as_deref(), Some("eu-west-1c"));
    assert_eq!(merged.disks, Some(Strategy::Direct));
    let wrong = Overrides { disks: Some("x".into()), ..Overrides::default() };
    let error = file.clone().merge(&wrong).unwrap_err();
    assert!(
        error.to_string().starts_with("`--disks` is \"x\": it must be `attached` or `direct`"),
        "{error}"
    );
    assert_eq!(Kind::of(&error), Kind::Usage);
    let wrong = Overrides { instance_id: Some("x".into()), ..Overrides::default() };
    let error = file.clone().merge(&wrong).unwrap_err();
    assert!(error.to_string().starts_with("`--instance-id` is \"x\""), "{error}");
    let wrong = Overrides { zone: Some("x".into()), ..Overrides::default() };
    assert!(file.clone().merge(&wrong).unwrap_err().to_string().starts_with("`--zone` is \"x\""));
    let error = file.merge(&Overrides { cloud: Some("azure".into()), ..Overrides::default() }).unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Usage);
    assert!(error.to_string().starts_with("`--cloud` is \"azure\""), "{error}");
}
