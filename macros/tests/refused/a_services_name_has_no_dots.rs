#[hopline::service(name = "demo.v1")]
trait Demo {
    async fn put(&self);
}

fn main() {}
