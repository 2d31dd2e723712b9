#[hopline::service(version = 4294967296)]
trait Demo {
    async fn put(&self);
}

fn main() {}
