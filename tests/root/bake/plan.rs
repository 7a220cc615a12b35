//! `oven plan`: what it says about a bake, and whether the bake then does that.

use super::story::{debian, small};
use oven_testing::LocalWorld;
use serde_json::Value;
use std::collections::BTreeMap;

fn objects(stream: &str) -> Vec<Value> {
    stream.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// The planned steps of a definition: phase, title, and whether the bake may skip it. `None` if they are not known.
fn planned(world: &LocalWorld, name: &str) -> Option<Vec<(String, String, bool)>> {
    let (out, _) = world.expect(0, &["--json", "plan", "--steps", &format!("examples/{name}")]);
    let result = objects(&out).pop().unwrap();
    let images = result["images"].as_array().unwrap();
    let image = images.iter().find(|image| image["name"] == name).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let steps = image["steps"].as_array()?.iter();
    Some(
        steps
            .map(|step| (text(&step["phase"]), text(&step["what"]), step["skipped_if"].is_string()))
            .collect(),
    )
}

/// The steps that a bake runs, without those of the package cache.
fn baked(world: &LocalWorld, name: &str) -> Vec<(String, String)> {
    let (out, _) = world.expect(0, &["--json", "bake", &format!("examples/{name}")]);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let steps = objects(&out).into_iter().filter(|event| event["event"] == "step" && event["image"] == name);
    let steps: Vec<_> = steps.map(|step| (text(&step["phase"]), text(&step["what"]))).collect();
    let phases: BTreeMap<_, _> = steps.iter().map(|(phase, what)| (what, phase)).collect();
    for (phase, what) in &steps {
        assert_eq!(phases[what], phase, "{what} is the title in two phases");
    }
    steps.into_iter().filter(|(phase, _)| phase != "cache").collect()
}

#[test]
fn the_steps_of_a_plan_are_those_of_the_bake() {
    let world = debian();
    assert_eq!(planned(&world, "web"), None, "its base does not exist yet");
    for name in ["base", "web"] {
        let before = world.files();
        let plan = planned(&world, name).unwrap();
        world.assert_no_traces("after a plan");
        let made: Vec<_> =
            world.files().difference(&before).filter(|file| !file.starts_with("blocks/")).cloned().collect();
        assert_eq!(made, Vec::<String>::new(), "a plan makes no volume, snapshot or image");
        let plan: Vec<_> = plan.into_iter().map(|(phase, what, _)| (phase, what)).collect();
        assert!(plan.iter().any(|(phase, _)| phase == "install"), "{plan:?}");
        assert_eq!(plan, baked(&world, name));
        assert_eq!(planned(&world, name), None, "it is baked");
    }
    // Now earlier bakes have filled the package cache. Steps that are skipped say so in the plan.
    let toml = std::fs::read_to_string(world.path("examples/base/image.toml")).unwrap();
    world.write("examples/base/image.toml", &toml.replace("\"jq\"", "\"jq\", \"file\""));
    let (plan, baked) = (planned(&world, "base").unwrap(), baked(&world, "base"));
    let certain: Vec<_> =
        plan.iter().filter(|(.., may_skip)| !may_skip).map(|(phase, what, _)| (phase, what)).collect();
    let mut rest = baked.iter();
    for (phase, what) in certain {
        assert!(
            rest.any(|step| (&step.0, &step.1) == (phase, what)),
            "{phase} {what} is not in order in {baked:?}"
        );
    }
    let all: Vec<_> = plan.into_iter().map(|(phase, what, _)| (phase, what)).collect();
    let mut rest = all.iter();
    for step in &baked {
        assert!(rest.any(|planned| planned == step), "{step:?} is not in order in {all:?}");
    }
}

#[test]
fn a_plan_names_the_keys_that_changed_and_the_time_of_the_last_bake() {
    let world = small();
    let toml = |more: &str| {
        world.write("web/image.toml", &format!("from = {{ name = \"small\" }}\nname = \"web\"\n{more}"))
    };
    let plan = || world.expect(0, &["plan", "web"]).0;
    toml("[tags]\nrole = \"web\"\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n");
    world.write("web/f", "one\n");
    assert!(!plan().contains("the last bake took"), "{}", plan());
    let (id, _) = world.expect(0, &["bake", "web"]);
    toml("[tags]\nrole = \"db\"\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\nmode = \"0600\"\n");
    let told = plan();
    for line in [
        "    image.toml: `role` of [tags] changed\n",
        "    image.toml: `mode` of [[file]] \"/etc/f\" is new\n",
        "  the last bake took ",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    assert!(!told.contains("image.toml changed"), "{told}");
    let (out, _) = world.expect(0, &["--json", "plan", "web"]);
    assert!(objects(&out).pop().unwrap()["images"][0]["last_ms"].as_u64().is_some_and(|ms| ms > 0), "{out}");
    toml("[tags] # one\nrole = \"web\"\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n");
    assert!(plan().contains("image.toml changed, but only its comments"), "{}", plan());
    // Another machine has only the tags.
    std::fs::remove_file(world.region().join("documents").join(format!("{}.json", id.trim()))).unwrap();
    let told = plan();
    assert!(
        told.contains("image.toml changed (which key is unknown, because this machine has only the tags"),
        "{told}"
    );
    assert!(!told.contains("the last bake took"), "{told}");
}
