//! Checks the role's permissions with the parameter DryRun. With this parameter, EC2 checks whether a call is
//! permitted, but does not execute it.

use super::call::ApiError;
use super::errors;
use super::errors::{Action, ErrorClass};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::images::convert::{filter, tag_specification};
use crate::cloud::{Base, Permission, PermissionVerdict, Tags, tag};
use crate::error::Kind;
use crate::ids::SnapshotId;
use crate::sys::state_files;
use anyhow::{Context, Result};
use aws_sdk_ec2::Client;
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::types::{self, ResourceType};
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};
use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// How long the result is cached if all permissions are granted.
const CACHE_TIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Ids that no resource has. If a server ignores DryRun and executes the call, it still changes nothing.
const VOLUME: &str = "vol-0ffffffffffffffff";
const SNAPSHOT: &str = "snap-0ffffffffffffffff";
const IMAGE: &str = "ami-0ffffffffffffffff";
/// An SSM parameter that does not exist. AWS permits every account to read the parameters below `/aws/service`. So only
/// the role's policy can refuse the call.
const PARAMETER: &str = "/aws/service/oven/permission-check";

impl Ec2 {
    /// Checks the permissions for the first and the last call of a bake. EBS direct (the API for blocks of snapshots)
    /// has no DryRun, so its calls are not checked. If all checked permissions are granted, this result is cached for a
    /// day. The cached result is valid only for the access key in use. An assumed role gets a new key every few hours,
    /// so its permissions are checked more often.
    pub(crate) async fn ensure_essentials(&self, base: &Base) -> Result<()> {
        if self.is_cached() {
            return Ok(());
        }
        let snapshot = Some(&base.snapshot);
        let mut checked = Vec::new();
        if !self.0.direct.get() {
            checked.push(self.check_create_volume(snapshot).await);
        }
        checked.push(self.check_register_image(snapshot).await);
        let missing: Vec<&str> = checked
            .iter()
            .filter(|permission| permission.verdict == PermissionVerdict::Missing)
            .map(|permission| permission.action.as_str())
            .collect();
        if !missing.is_empty() {
            let text = format!("the role lacks permissions: {}", missing.join(", "));
            let hint =
                "`oven doctor` lists all missing permissions, and `oven policy` prints the minimal policy.";
            return Err(Kind::Cloud.failure(text).hint(hint).into());
        }
        // A permission that could not be checked does not stop the bake. If it is missing, a later call fails and
        // reports it.
        if checked.iter().all(|permission| permission.verdict == PermissionVerdict::Granted) {
            // If the result cannot be cached, the next bake repeats the check.
            _ = self.write_cache();
        }
        Ok(())
    }

    fn cache_file(&self) -> Option<PathBuf> {
        let caller = format!("{} {}", self.region(), self.0.wire.key()?);
        let digest: String =
            Sha256::digest(caller).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let suffix = if self.0.direct.get() { "-direct" } else { "" };
        Some(self.0.options.documents.join(format!("permitted{suffix}-{digest}")))
    }

    fn is_cached(&self) -> bool {
        let written = self.cache_file().and_then(|path| fs::metadata(path).ok()?.modified().ok());
        let age = written.and_then(|written| SystemTime::now().duration_since(written).ok());
        age.is_some_and(|age| age < CACHE_TIME)
    }

    fn write_cache(&self) -> Result<()> {
        let Some(path) = self.cache_file() else { return Ok(()) };
        let dir = &self.0.options.documents;
        let context = || format!("writing {}", path.display());
        state_files::create_dir(dir).with_context(context)?;
        let file = state_files::open_file(&path, OFlags::WRONLY | OFlags::CREATE).with_context(context)?;
        file.set_modified(SystemTime::now()).with_context(context)
    }

    /// Sends one DryRun. `tagged` means that the minimal policy permits the action only for resources with oven's tags.
    /// But the resource that the DryRun names does not exist and has no tags. So if `tagged` is set, a refusal does not
    /// prove that the permission is missing.
    async fn dry_run<T, E, F>(
        &self,
        action: &'static Action,
        tagged: bool,
        mut send: impl FnMut(&Client) -> F,
    ) -> Permission
    where
        F: Future<Output = Result<T, SdkError<E>>>,
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let send = async || {
            send(&self.client()).await.map_err(|error| {
                let mut refused = ApiError::of(action, "", error);
                // The object of a DryRun will never exist, so the call must not wait for it.
                if refused.class == ErrorClass::NotVisibleYet {
                    refused.class = ErrorClass::Fatal;
                }
                refused
            })
        };
        let verdict = match self.repeat(action, "", send).await {
            // A server that supports DryRun never returns success. If the call is permitted, it returns the error
            // DryRunOperation.
            Ok(_) => PermissionVerdict::Unknown("the server does not support DryRun".to_owned()),
            Err(refused) => verdict(&refused, tagged),
        };
        Permission { action: action.permission(), verdict }
    }

    fn tags() -> Tags {
        [(tag::RUN.to_owned(), "permission-check".to_owned())].into()
    }

    /// `of` is the snapshot from which the volume would be created. If it is `None`, an empty volume is requested.
    async fn check_create_volume(&self, of: Option<&SnapshotId>) -> Permission {
        let zone = self.0.options.zone.clone();
        let (of, size) = (of.map(|id| id.0.clone()), of.is_none().then_some(1));
        self.dry_run(&errors::CREATE_VOLUME, false, |client| {
            let call = client.create_volume().dry_run(true).set_availability_zone(zone.clone());
            let call = call.set_snapshot_id(of.clone()).set_size(size);
            call.volume_type(types::VolumeType::Gp3)
                .tag_specifications(tag_specification(ResourceType::Volume, &Self::tags()))
                .send()
        })
        .await
    }

    /// `of` is an existing snapshot. If it is `None`, the call names a snapshot that does not exist.
    async fn check_register_image(&self, of: Option<&SnapshotId>) -> Permission {
        let ebs = types::EbsBlockDevice::builder().snapshot_id(of.map_or(SNAPSHOT, |id| &id.0)).build();
        let root = types::BlockDeviceMapping::builder().device_name("/dev/xvda").ebs(ebs).build();
        self.dry_run(&errors::REGISTER_IMAGE, false, |client| {
            let call = client
                .register_image()
                .dry_run(true)
                .name("oven-permission-check")
                .root_device_name("/dev/xvda");
            let call = call.architecture(types::ArchitectureValues::X8664).virtualization_type("hvm");
            let call = call.block_device_mappings(root.clone());
            call.tag_specifications(tag_specification(ResourceType::Image, &Self::tags())).send()
        })
        .await
    }

    /// Checks all permissions that bakes need. They depend on whether disks are attached volumes or are accessed
    /// through EBS direct.
    pub(crate) async fn run_permission_checks(&self) -> Result<Vec<Permission>> {
        let mut all = self.check_describe_actions().await;
        if self.0.direct.get() {
            all.extend(self.check_direct_actions().await);
        } else {
            all.extend(self.check_attached_actions().await);
        }
        all.extend([
            self.dry_run(&errors::DELETE_SNAPSHOT, true, |c| {
                c.delete_snapshot().dry_run(true).snapshot_id(SNAPSHOT).send()
            })
            .await,
            self.check_register_image(None).await,
            self.dry_run(&errors::DEREGISTER_IMAGE, true, |c| {
                c.deregister_image().dry_run(true).image_id(IMAGE).send()
            })
            .await,
            self.dry_run(&errors::CREATE_TAGS, true, |c| {
                let tag = types::Tag::builder().key(tag::KEPT).value("true").build();
                let on = if self.0.direct.get() { IMAGE } else { VOLUME };
                c.create_tags().dry_run(true).resources(on).tags(tag).send()
            })
            .await,
            self.check_get_parameter().await,
        ]);
        Ok(all)
    }

    async fn check_describe_actions(&self) -> Vec<Permission> {
        let none = || filter("tag-key", [tag::RUN]);
        vec![
            self.dry_run(&errors::DESCRIBE_IMAGES, false, |c| {
                c.describe_images().dry_run(true).owners("self").filters(none()).send()
            })
            .await,
            self.dry_run(&errors::DESCRIBE_VOLUMES, false, |c| {
                c.describe_volumes().dry_run(true).filters(none()).send()
            })
            .await,
            self.dry_run(&errors::DESCRIBE_SNAPSHOTS, false, |c| {
                c.describe_snapshots().dry_run(true).owner_ids("self").filters(none()).send()
            })
            .await,
            self.dry_run(&errors::DESCRIBE_INSTANCES, false, |c| {
                c.describe_instances().dry_run(true).filters(none()).send()
            })
            .await,
        ]
    }

    async fn check_attached_actions(&self) -> Vec<Permission> {
        let known_instance = self.0.options.instance_id.clone();
        // The calls need an instance id. If oven does not know the id of its instance, it uses an id that no instance
        // has. Then a refusal does not prove that a permission is missing.
        let instance = known_instance.clone().unwrap_or_else(|| "i-0ffffffffffffffff".to_owned());
        vec![
            self.check_create_volume(None).await,
            self.dry_run(&errors::ATTACH_VOLUME, true, |c| {
                c.attach_volume()
                    .dry_run(true)
                    .volume_id(VOLUME)
                    .instance_id(&instance)
                    .device("/dev/sdf")
                    .send()
            })
            .await,
            self.dry_run(&errors::MODIFY_INSTANCE_ATTRIBUTE, known_instance.is_none(), |c| {
                let ebs =
                    types::EbsInstanceBlockDeviceSpecification::builder().delete_on_termination(true).build();
                let mapping = types::InstanceBlockDeviceMappingSpecification::builder()
                    .device_name("/dev/sdf")
                    .ebs(ebs);
                let call = c.modify_instance_attribute().dry_run(true).instance_id(&instance);
                call.block_device_mappings(mapping.build()).send()
            })
            .await,
            self.dry_run(&errors::DETACH_VOLUME, true, |c| {
                c.detach_volume().dry_run(true).volume_id(VOLUME).send()
            })
            .await,
            self.dry_run(&errors::DELETE_VOLUME, true, |c| {
                c.delete_volume().dry_run(true).volume_id(VOLUME).send()
            })
            .await,
            self.dry_run(&errors::CREATE_SNAPSHOT, true, |c| {
                let call = c.create_snapshot().dry_run(true).volume_id(VOLUME);
                call.tag_specifications(tag_specification(ResourceType::Snapshot, &Self::tags())).send()
            })
            .await,
        ]
    }

    async fn check_direct_actions(&self) -> Vec<Permission> {
        let copied: Tags = [(tag::COPY.to_owned(), SNAPSHOT.to_owned())].into();
        let mut all = vec![
            self.dry_run(&errors::GET_EBS_ENCRYPTION_BY_DEFAULT, false, |c| {
                c.get_ebs_encryption_by_default().dry_run(true).send()
            })
            .await,
            self.dry_run(&errors::COPY_SNAPSHOT, false, |c| {
                let call = c.copy_snapshot().dry_run(true).source_snapshot_id(SNAPSHOT);
                let call = call.source_region(self.region());
                call.tag_specifications(tag_specification(ResourceType::Snapshot, &copied)).send()
            })
            .await,
        ];
        all.extend(errors::EBS_ACTIONS.iter().map(|action| {
            let verdict = PermissionVerdict::Unknown(
                "EBS direct has no DryRun, so only a bake shows whether the action is permitted".to_owned(),
            );
            Permission { action: action.permission(), verdict }
        }));
        all
    }

    /// Checks GetParameter. SSM has no DryRun, so this requests a parameter that does not exist.
    async fn check_get_parameter(&self) -> Permission {
        let verdict = match self.ssm() {
            None => PermissionVerdict::Unknown("SSM is not configured".to_owned()),
            Some(client) => {
                let send = async || {
                    let sent = client.get_parameter().name(PARAMETER).send().await;
                    sent.map_err(|error| ApiError::of(&errors::GET_PARAMETER, PARAMETER, error))
                };
                match self.repeat(&errors::GET_PARAMETER, PARAMETER, send).await {
                    Ok(_) => PermissionVerdict::Granted,
                    Err(refused) => verdict(&refused, false),
                }
            }
        };
        Permission { action: errors::GET_PARAMETER.permission(), verdict }
    }
}

fn verdict(refused: &ApiError, tagged: bool) -> PermissionVerdict {
    let code = refused.code.as_deref().unwrap_or_default();
    let unknown = |why: String| PermissionVerdict::Unknown(why);
    match code {
        "DryRunOperation" | "ParameterNotFound" => PermissionVerdict::Granted,
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" if tagged => {
            let why = "the resource of this check does not exist and has no tags, so a policy that is limited to oven's \
                       tags refuses the call as well";
            unknown(format!("{code}: {why}"))
        }
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" => PermissionVerdict::Missing,
        // For some actions, EC2 looks for the resource before it checks the permission. After such an error, the
        // permission is unknown.
        _ if code.ends_with(".NotFound") || code == "InvalidInstanceAttributeValue" => unknown(
            "EC2 reported that the resource does not exist, which does not show whether the action is permitted".into(),
        ),
        _ => unknown(refused.to_string()),
    }
}
