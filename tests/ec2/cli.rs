//! The real program on AWS, as far as it goes on a machine whose volumes are no NVMe disks: what looks, what sweeps,
//! what is refused, and in which words.

use oven_ec2_server::{Fault, ServerOptions, What};
use oven_testing::ec2_world::{Ended, HANGS, HERE};
use oven_testing::{Ec2World, each};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

fn run(world: &Ec2World, change: impl FnOnce(&mut Command), args: &[&str]) -> Ended {
    let mut command = world.plain(args);
    change(&mut command);
    world.start(command).end(HANGS, "oven")
}

/// Ends with this code, says all of this on standard error, and nothing on standard output.
fn refuses(ended: &Ended, code: i32, words: &[&str]) {
    let text = format!("{:?}\n{}\n{}", ended.code(), ended.out, ended.err);
    assert_eq!(ended.code(), Some(code), "{text}");
    assert_eq!(ended.out, "", "{text}");
    for word in words {
        assert!(ended.err.contains(word), "no {word:?} in {text}");
    }
    // One line says what went wrong, and no more than one what to do.
    let errors = ended.err.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && ended.err.lines().count() <= 2, "{text}");
    // And neither shows the insides of a program.
    assert!(!ended.err.contains(" { ") && ended.err.len() < 600, "{text}");
}

fn changing(world: &Ec2World) -> Vec<String> {
    let calls = world.server.ec2_calls().into_iter().map(|call| call.action);
    calls.filter(|action| !action.starts_with("Describe")).collect()
}

#[test]
fn images_and_plans_of_what_is_baked() {
    let world = Ec2World::tiny(ServerOptions::default());
    let none = world.expect(0, &["images", "list"]);
    assert!(
        none.out.is_empty() && none.err.contains("no images") && !none.err.contains("import"),
        "{}",
        none.err
    );
    let plan = world.expect(0, &["plan", "image"]);
    assert_eq!(
        plan.out, "image: to be baked\n  no image of the definition `image` exists yet\n",
        "{}",
        plan.err
    );
    let baked = world.bake("baked");
    let ami = baked.image().expect(&baked.err);
    world.server.forget_calls();
    let plan = world.expect(0, &["plan", "image"]);
    assert_eq!(plan.out, format!("image: already baked as {ami}\n"));
    assert!(world.server.ec2_calls().len() <= 3, "{}", world.calls());
    for list in [&["images", "list"][..], &["images", "list", "image"]] {
        let listed = world.expect(0, list);
        assert_eq!(listed.out.lines().count(), 1, "{}", listed.out);
        assert!(listed.out.starts_with(&format!("{ami}  available  ")) && listed.out.contains("  image-"));
    }
    let shown = world.expect(0, &["images", "show", ami]);
    for words in [
        "snapshot  snap-",
        "tag       oven:fingerprint = ",
        "tag       oven:owner = i-",
        "ami_config_checksum",
    ] {
        assert!(shown.out.contains(words), "{words}: {}", shown.out);
    }
    let json = world.expect(0, &["--json", "images", "show", ami]);
    let json: serde_json::Value = serde_json::from_str(json.out.lines().last().unwrap()).unwrap();
    assert_eq!((json["id"].as_str(), json["exit_code"].as_u64()), (Some(ami), Some(0)));
    // A change is explained from the image's tags: no file of the builder is needed.
    world.local.write("image/new", "a file\n");
    let plan = world.expect(0, &["plan", "image"]);
    assert!(plan.out.starts_with("image: to be baked\n") && plan.out.lines().count() > 1, "{}", plan.out);
    refuses(
        &world.oven(&["images", "show", "ami-0123456789abcdef0"]),
        4,
        &["ami-0123456789abcdef0", "us-east-1"],
    );
    refuses(&world.oven(&["images", "remove", ami]), 2, &["local region", "AWS"]);
    world.assert_one(ami, "looked at");
    let swept = world.expect(0, &["sweep"]);
    assert!(
        swept.out.is_empty() && swept.err.contains("there are no leftovers of ended runs"),
        "{}",
        swept.err
    );
    world.assert_one(ami, "swept");
}

#[test]
fn a_bake_without_nvme_is_refused_before_anything_is_asked() {
    let world = Ec2World::tiny(ServerOptions::default());
    world.local.write("oven.toml", "cloud = \"aws\"\n");
    let no_nvme = ["no NVMe disks", "Nitro"];
    // By the flag, the variable, and the file.
    refuses(&world.oven(&["bake", "image"]), 8, &no_nvme);
    refuses(&run(&world, |command| _ = command.env("OVEN_CLOUD", "aws"), &["bake", "image"]), 8, &no_nvme);
    refuses(&run(&world, |_| (), &["bake", "image"]), 8, &no_nvme);
    let shell = world.oven(&["shell", "00000000", "--", "true"]);
    refuses(&shell, 8, &no_nvme);
    assert!(world.server.calls().is_empty(), "{}", world.calls());
    let doctor = world.oven(&["doctor"]);
    assert_eq!(doctor.code(), Some(8), "{}\n{}", doctor.out, doctor.err);
    let lacks: Vec<&str> = doctor.out.lines().filter(|line| line.starts_with("lacks")).collect();
    assert!(lacks.len() == 1 && lacks[0].contains("no NVMe disks"), "{lacks:?}");
    assert!(changing(&world).is_empty(), "{}", world.calls());
    assert_eq!(world.made(), Default::default());
}

#[test]
fn what_is_wrong_with_the_surroundings_is_named() {
    let world = &Ec2World::tiny(ServerOptions::default());
    let none = &Ec2World::tiny(ServerOptions { role: None, ..ServerOptions::default() });
    let keys = "aws_access_key_id = AKIA\naws_secret_access_key = secret\n";
    world.local.write(".aws/config", &format!("[profile abroad]\nregion = sa-east-1\n{keys}"));
    type Case<'a> = (&'a str, Box<dyn Fn() -> Ended + Sync + 'a>, i32, Vec<&'a str>, u64);
    let list = ["--cloud", "aws", "images", "list"];
    let with = |name: &'static str, value: &'static str| {
        move || run(world, |command| _ = command.env(name, value), &["--cloud", "aws", "images", "list"])
    };
    let cases: Vec<Case> = vec![
        (
            "another region",
            Box::new(|| world.oven(&["--region", "eu-west-1", "images", "list"])),
            6,
            vec!["AuthFailure", "region"],
            5,
        ),
        (
            "another region, by the environment",
            Box::new(with("AWS_REGION", "eu-west-1")),
            6,
            vec!["AuthFailure"],
            5,
        ),
        (
            "no endpoint",
            Box::new(with("AWS_ENDPOINT_URL", "http://127.0.0.1:1")),
            6,
            vec!["Connection refused", "network", "AWS_ENDPOINT_URL"],
            20,
        ),
        (
            "a profile of another region",
            Box::new(with("AWS_PROFILE", "abroad")),
            6,
            vec!["AuthFailure", "sa-east-1"],
            5,
        ),
        ("no role", Box::new(move || run(none, |_| (), &list)), 6, vec!["role", "AWS_PROFILE"], 20),
        (
            "no metadata service",
            Box::new(move || {
                let change = |command: &mut Command| {
                    command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_REGION", "us-east-1");
                };
                run(world, change, &list)
            }),
            6,
            vec!["credentials", "role"],
            20,
        ),
        (
            "no region",
            Box::new(move || {
                run(world, |command| _ = command.env("AWS_EC2_METADATA_DISABLED", "true"), &list)
            }),
            8,
            vec!["no AWS region is set", "--region"],
            20,
        ),
        (
            "an unknown cloud",
            Box::new(move || run(world, |_| (), &["--cloud", "awss", "images", "list"])),
            2,
            vec!["awss", "aws"],
            5,
        ),
    ];
    each(&cases, |(name, ask, code, words, seconds)| {
        let ended = ask();
        println!("{name}: {:?} after {:?}\n{}", ended.code(), ended.took, ended.err);
        refuses(&ended, *code, words);
        assert!(ended.took < Duration::from_secs(*seconds), "{name}: {:?}", ended.took);
    });
    assert!(changing(world).is_empty(), "{}", world.calls());
}

#[test]
fn what_ec2_refuses_is_named() {
    for (code, words) in [
        ("UnauthorizedOperation", vec!["UnauthorizedOperation", "DescribeImages", "oven policy"]),
        ("AuthFailure", vec!["AuthFailure", "DescribeImages"]),
        ("RequestExpired", vec!["RequestExpired", "clock"]),
        ("OptInRequired", vec!["OptInRequired"]),
    ] {
        let faults = vec![Fault::new("DescribeImages", 1, What::Error(code.into())).times(99)];
        let world = Ec2World::tiny(ServerOptions { faults, ..ServerOptions::default() });
        refuses(&world.oven(&["images", "list"]), 6, &words);
        refuses(&world.oven(&["plan", "image"]), 6, &words);
    }
}

#[test]
fn bases_as_a_plan_finds_them() {
    let world = Ec2World::tiny(ServerOptions::default());
    let base = world.base();
    world.server.set(|options| {
        options.parameters.insert("/aws/service/base".into(), base.clone());
    });
    let plan = |from: &str| {
        world.local.write("image/image.toml", &format!("name = \"image\"\nfrom = {from}\n"));
        world.oven(&["plan", "image"])
    };
    for from in [
        format!("\"{base}\""),
        "{ name = \"base\", owner = \"self\" }".to_owned(),
        "{ name = \"ba*\", owner = \"123456789012\" }".to_owned(),
        "{ ssm = \"/aws/service/base\" }".to_owned(),
    ] {
        let ended = plan(&from);
        assert_eq!(ended.code(), Some(0), "{from}: {}", ended.err);
        assert!(ended.out.starts_with("image: to be baked\n"), "{from}: {}", ended.out);
    }
    refuses(&plan("\"ami-0123456789abcdef0\""), 4, &["ami-0123456789abcdef0"]);
    refuses(&plan("{ name = \"none-*\", owner = \"self\" }"), 4, &["none-*"]);
    refuses(&plan("{ ssm = \"/none\" }"), 4, &["/none"]);
    // Anybody may call an image so.
    refuses(&plan("{ name = \"base\" }"), 3, &["owner"]);
    assert!(changing(&world).is_empty(), "{}", world.calls());
}

#[test]
fn a_sweep_by_name_needs_the_whole_name_of_a_run_that_may_be_active() {
    let world = Ec2World::tiny(ServerOptions::default());
    world.plant_foreign(true);
    let before = world.foreign();
    for run in ["0000000000000000000000000000aaaa", "bbbb"] {
        refuses(&world.oven(&["sweep", "--run", run]), 4, &["no leftovers of run"]);
    }
    let would = world.expect(0, &["sweep", "--dry-run", "--older-than", "0s"]);
    // Of the living process here nothing, whatever is asked for.
    assert!(would.out.contains("0f003") && !would.out.contains("0f002"), "{}", would.out);
    assert_eq!(world.foreign(), before);
    assert!(changing(&world).is_empty(), "{}", world.calls());
    let services: BTreeSet<String> = world.server.calls().into_iter().map(|call| call.service).collect();
    assert_eq!(services, ["ec2", "imds"].map(str::to_owned).into(), "{HERE}");
}
