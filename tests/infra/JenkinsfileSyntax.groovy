// Parse Jenkinsfiles as Groovy, without running anything: groovy JenkinsfileSyntax.groovy FILE...
// Then look at what the declarative form demands: one pipeline block with agent and stages, no empty stage.
import org.codehaus.groovy.ast.CodeVisitorSupport
import org.codehaus.groovy.ast.expr.ClosureExpression
import org.codehaus.groovy.ast.expr.MethodCallExpression
import org.codehaus.groovy.ast.expr.TupleExpression
import org.codehaus.groovy.control.CompilationFailedException
import org.codehaus.groovy.control.CompilationUnit
import org.codehaus.groovy.control.Phases

List<String> namesIn(MethodCallExpression call) {
  def closure = ((TupleExpression) call.arguments).expressions.find { it instanceof ClosureExpression }
  closure == null ? [] : closure.code.statements.findAll { it.hasProperty('expression') && it.expression instanceof MethodCallExpression }
    .collect { it.expression.methodAsString }
}

int bad = 0
args.each { String path ->
  try {
    def unit = new CompilationUnit()
    unit.addSource('Jenkinsfile', new File(path).text)
    unit.compile(Phases.CONVERSION)
    List<String> problems = []
    int stages = 0
    boolean pipeline = false
    unit.AST.modules.each { module ->
      module.statementBlock.visit(new CodeVisitorSupport() {
        @Override
        void visitMethodCallExpression(MethodCallExpression call) {
          List<String> inside = call.arguments instanceof TupleExpression ? namesIn(call) : []
          if (call.methodAsString == 'pipeline') {
            pipeline = true
            ['agent', 'stages'].findAll { !inside.contains(it) }.each { problems << "pipeline has no ${it}" }
          }
          if (call.methodAsString == 'stage') {
            stages++
            if (!['steps', 'parallel', 'stages', 'matrix'].any { inside.contains(it) }) {
              problems << "line ${call.lineNumber}: a stage without steps"
            }
          }
          super.visitMethodCallExpression(call)
        }
      })
    }
    if (!pipeline) { problems << 'no pipeline block' }
    problems.each { println "BAD $path: $it" }
    bad += problems.size()
    if (!problems) { println "ok  $path: $stages stages" }
  } catch (CompilationFailedException e) {
    bad++
    println "BAD $path: " + e.message.readLines().findAll { it.trim() }.take(3).join(' | ')
  }
}
System.exit(bad == 0 ? 0 : 1)
