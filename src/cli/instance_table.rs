//! Instances as a table or as JSON.

use stead_schemas::api::Instance;
use stead_schemas::condition::{self, ConditionStatus, ConditionType};

use super::show::{age, print};
use super::{Failure, Output};

pub(super) fn show_all(instances: &[Instance], output: Output) -> Result<(), Failure> {
    print(&instances, output, &["NAME", "STATE", "IMAGE", "ADDRESS", "CPUS", "MEMORY", "AGE", "NOTE"], || {
        instances.iter().map(row).collect()
    })
}

fn row(instance: &Instance) -> Vec<String> {
    let ready = condition::find(&instance.conditions, ConditionType::Ready);
    let note = ready
        .filter(|ready| ready.status != ConditionStatus::True)
        .map_or("", |ready| ready.message.as_str());
    vec![
        instance.name.clone(),
        format!("{:?}", instance.state),
        instance.image.clone(),
        instance.network.ip.clone().unwrap_or_else(|| "-".to_owned()),
        instance.vcpus.to_string(),
        instance.size.clone(),
        age(instance.created_at),
        note.to_owned(),
    ]
}
