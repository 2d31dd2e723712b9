#[hopline::service(version = "1")]
trait Demo {
    async fn put(&self);
}

fn main() {}
