use super::*;

struct Fake(&'static str, &'static str, &'static str);
impl Distro for Fake {
    fn id(&self) -> &str {
        self.0
    }
    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            id if id == self.1 => Claim::Exact,
            _ if os.id_like().any(|id| id == self.2) => Claim::Family,
            _ => Claim::No,
        };
        Claims { claim, ..Claims::default() }
    }
    fn plan(&self, _: &Job) -> Result<Plan, Refused> {
        Err(Refused("not today".into()))
    }
}

fn registry(known: &[Fake]) -> PluginRegistry {
    PluginRegistry::built_in(known.iter().map(|f| Box::new(Fake(f.0, f.1, f.2)) as Box<dyn Distro>).collect())
}

fn who(known: &[Fake], os: &str, named: Option<&str>) -> String {
    let place = Place::new("web/image.toml".into(), Some(2), Some("distro".into()), "`distro`");
    match registry(known).detect(&OsRelease::parse(os), named.map(|id| (id, &place))) {
        Ok((distro, _)) => distro.id.clone(),
        Err(error) => {
            format!("{error:#} {}", crate::error::hint_of(&error).unwrap_or_default())
        }
    }
}

#[test]
fn the_best_claim_wins() {
    let known = [Fake("debian", "debian", "debian"), Fake("mint", "linuxmint", "-")];
    assert_eq!(who(&known, "ID=debian", None), "debian");
    assert_eq!(who(&known, "ID=kali\nID_LIKE=debian", None), "debian");
    assert_eq!(who(&known, "ID=linuxmint\nID_LIKE=debian", None), "mint");
}

#[test]
fn a_tie_and_no_claim_list_the_plugins() {
    let known = [Fake("one", "debian", "-"), Fake("two", "debian", "-")];
    let tie = who(&known, "ID=debian", None);
    for words in ["one (built in) and two (built in)", "`debian`", "distro = \"one\""] {
        assert!(tie.contains(words), "{tie}");
    }
    let none = who(&known, "ID=plan9\nPRETTY_NAME=\"Plan 9\"", None);
    assert!(none.contains("`plan9`, Plan 9") && none.contains("Known plugins: one, two."), "{none}");
    assert!(who(&[], "", None).contains("`linux`"));
}

#[test]
fn a_definition_picks_one() {
    let known = [Fake("one", "debian", "-"), Fake("two", "debian", "-"), Fake("three", "void", "-")];
    assert_eq!(who(&known, "ID=debian", Some("two")), "two");
    let none = who(&known, "ID=debian", Some("four"));
    assert!(none.contains("image.toml:2: `distro`: there is no plugin \"four\""), "{none}");
    let other = who(&known, "ID=debian", Some("three"));
    assert!(other.contains("three does not support `debian`"), "{other}");
}

#[test]
fn a_refusal_is_the_definitions() {
    let registry = registry(&[Fake("one", "debian", "-")]);
    let error = registry.known()[0].plan(&Job::default()).unwrap_err();
    assert_eq!(format!("{error:#}"), "planning the installation: not today");
    assert_eq!(Kind::of(&error), Kind::Definition);
}

#[test]
fn names_are_unique() {
    let exec = |path: &str| ExecutablePlugin::new(Path::new(path), Vec::new(), Path::new("oven"));
    let installed = |path: &str| Origin::Installed(path.into());
    let mut all = registry(&[Fake("debian", "debian", "-")]);
    let taken = all.add(installed("/etc/debian.sh"), "debian", exec("/etc/debian.sh")).unwrap_err();
    assert!(taken.contains("built-in"), "{taken}");
    all.add(installed("/etc/void"), "void", exec("/etc/void")).unwrap();
    let hidden = all.add(installed("/usr/void"), "void", exec("/usr/void")).unwrap_err();
    assert!(hidden.contains("hidden by /etc/void"), "{hidden}");
}
