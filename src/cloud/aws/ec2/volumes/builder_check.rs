//! Checks that the given instance can be the builder, which is the machine that runs oven. The check is made before
//! oven creates any resource.

use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::errors::{DESCRIBE_INSTANCES, ErrorClass};
use crate::cloud::aws::ec2::images::convert::filter;
use crate::error::Kind;
use anyhow::Result;
use aws_sdk_ec2::types::{Instance, InstanceStateName};

impl Ec2 {
    /// Fails if the given instance is not a running instance in the given zone. The instance id and the zone may come
    /// from the command line, so they may be wrong. If the zone is wrong, volumes cannot be attached to the instance.
    pub(crate) async fn ensure_builder(&self) -> Result<()> {
        let (id, zone) = (self.instance()?, self.zone()?);
        let what = format!("the builder {id}");
        let wanted = filter("instance-id", [id]);
        let sent = self.call(&DESCRIBE_INSTANCES, &what, |client| {
            client.describe_instances().filters(wanted.clone()).send()
        });
        let found = match sent.await {
            Ok(found) => found,
            // If the role lacks the permission for DescribeInstances, the check is skipped. A wrong instance then makes
            // a later call fail.
            Err(refused) if refused.class == ErrorClass::Fatal && refused.is("UnauthorizedOperation") => {
                return Ok(());
            }
            Err(refused) => return Err(refused.into()),
        };
        let instance = found.reservations().iter().flat_map(|some| some.instances()).next();
        match instance
            .map_or_else(|| Some(format!("is not in {}", self.region())), |found| problem(found, zone))
        {
            None => Ok(()),
            Some(problem) => {
                let hint = "Set --instance-id and --zone to the instance that oven runs on, or leave both out, so that \
                            the metadata service supplies them.";
                Err(Kind::Machine
                    .failure(format!("{id} cannot be the builder: it {problem}"))
                    .hint(hint)
                    .into())
            }
        }
    }
}

fn problem(instance: &Instance, zone: &str) -> Option<String> {
    let state = instance.state.as_ref().and_then(|state| state.name.as_ref());
    if let Some(state) = state.filter(|state| **state != InstanceStateName::Running) {
        return Some(format!("is {}", state.as_str()));
    }
    let theirs = instance.placement.as_ref().and_then(|placement| placement.availability_zone.as_deref());
    theirs.filter(|theirs| *theirs != zone).map(|theirs| format!("is in {theirs}, and not in {zone}"))
}
