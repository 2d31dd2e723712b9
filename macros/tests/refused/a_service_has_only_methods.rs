#[hopline::service]
trait Demo {
    methods!();
    pub async fn put(&self);
}

fn main() {}
