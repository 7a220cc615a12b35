//! Which plugin an image is for.

use crate::error::Kind;
use anyhow::Result;
use oven_distro::{Claim, Distro, OsRelease};

/// The one plugin with the best claim on an image. None, or several that claim it alike, are errors that name them.
pub fn detect<'a>(known: &'a [Box<dyn Distro>], os: &OsRelease) -> Result<&'a dyn Distro> {
    let claims: Vec<_> = known.iter().map(|distro| (distro.claims(os).claim, &**distro)).collect();
    let best = claims.iter().map(|(claim, _)| *claim).max().unwrap_or(Claim::No);
    let mut winners = claims.into_iter().filter(|(claim, _)| *claim == best).map(|(_, distro)| distro);
    match (best, winners.next(), winners.next()) {
        (Claim::No, ..) | (_, None, _) => {
            let ids: Vec<_> = known.iter().map(|distro| distro.id()).collect();
            let name = os.get("PRETTY_NAME").map(|name| format!(", {name}")).unwrap_or_default();
            Err(Kind::Definition
                .failure(format!("the base image is `{}`{name}: no plugin knows it", os.id()))
                .hint(format!("Known are: {}.", ids.join(", ")))
                .into())
        }
        (_, Some(distro), None) => Ok(distro),
        (_, Some(one), Some(other)) => Err(Kind::Machine.error(format!(
            "two plugins, {} and {}, claim an image of `{}`: only one may",
            one.id(),
            other.id(),
            os.id()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::{Claims, Job, Plan, Refused};

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
            Ok(Plan::default())
        }
    }

    fn who(known: &[Fake], os: &str) -> String {
        let known: Vec<_> = known.iter().map(|f| Box::new(Fake(f.0, f.1, f.2)) as Box<dyn Distro>).collect();
        match detect(&known, &OsRelease::parse(os)) {
            Ok(distro) => distro.id().to_owned(),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn the_best_claim_wins() {
        let known = [Fake("debian", "debian", "debian"), Fake("mint", "linuxmint", "-")];
        assert_eq!(who(&known, "ID=debian"), "debian");
        assert_eq!(who(&known, "ID=kali\nID_LIKE=debian"), "debian");
        assert_eq!(who(&known, "ID=linuxmint\nID_LIKE=debian"), "mint");
    }

    #[test]
    fn a_tie_and_no_claim_name_what_there_is() {
        let known = [Fake("one", "debian", "-"), Fake("two", "debian", "-")];
        let tie = who(&known, "ID=debian");
        assert!(tie.contains("one and two") && tie.contains("`debian`"), "{tie}");
        let none = who(&known, "ID=plan9\nPRETTY_NAME=\"Plan 9\"");
        assert!(none.contains("`plan9`, Plan 9"), "{none}");
        assert!(who(&[], "").contains("`linux`"));
    }

    #[test]
    fn debian_is_known() {
        let known: Vec<Box<dyn Distro>> = vec![Box::new(oven_debian::Debian)];
        assert_eq!(detect(&known, &OsRelease::parse("ID=ubuntu\nID_LIKE=debian")).unwrap().id(), "debian");
    }
}
